"""Loops in C++ for CPUs with AVX512, with torch tensors as arguments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from a3_engine.kv import ChunkKV
from a3_engine.native.build import library

__all__ = ["attend", "attends", "library", "place", "places", "shift", "shifts"]

BLOCK_ROWS = 64
TASKS_A_THREAD = 4  # so that none waits long for the last
LEAST_KEYS = 256  # of a task, where keys are cut
TILE = 128  # rows of keys or values that are multiplied at once; kTile in tiles.h

Chunks = Sequence[tuple[int, ChunkKV]]
Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]

_Pointer, _Long = ctypes.c_void_p, ctypes.c_long


def attends(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> bool:
    """Whether :func:`attend` takes these: of one dtype on the CPU, a head's tokens side by side."""
    head_dim = query.shape[-1]
    return (
        query.stride(-1) == 1
        and head_dim % 16 == 0
        and all(
            key.stride()[1:] == value.stride()[1:] and key.stride()[2:] == (head_dim, 1)
            for key, value in zip(keys, values, strict=True)
        )
        and _are_ours([query, *keys, *values])
    )


def attend(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    first: torch.Tensor,
    last: torch.Tensor,
    scaling: float,
    shared: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the rows of several sequences, each over its own sequence's keys.

    Parameters
    ----------
    query : torch.Tensor
        Shape ``(sequences, heads, rows, head_dim)``.
    keys, values : sequence of torch.Tensor
        Of each sequence, ``(1, kv_heads, its tokens, head_dim)``, with tokens side by side.
    first, last : torch.Tensor
        int64, ``(sequences, rows)`` or ``(1, rows)``: a row sees the keys from ``first`` to before
        ``last``, at least one.
    scaling : float
        Of the scores.
    shared : torch.Tensor or None
        Sorted int64 indices of keys that every row sees too, where they stand before its ``first``.
    sinks : torch.Tensor or None
        A score of each head, whose weight goes nowhere; ``(heads,)``.

    Returns
    -------
    torch.Tensor
        Shape ``(sequences, rows, heads, head_dim)``, from scores and sums in fp32.
    """
    sequences, heads, rows, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    output = query.new_empty(sequences, rows, heads, head_dim)
    first, last = (at.expand(sequences, rows).contiguous() for at in (first, last))
    counts = first
    if shared is not None:
        counts = torch.searchsorted(shared, first)
    shared_keys, shared_values = (
        [one.index_select(2, shared) for one in states] if shared is not None else []
        for states in (keys, values)
    )
    threads = torch.get_num_threads()
    tasks = sequences * kv_heads * -(-rows // BLOCK_ROWS)
    most = max(1, max(key.shape[2] for key in keys) // LEAST_KEYS)
    splits = -(-TASKS_A_THREAD * threads // tasks)
    if tasks % threads:  # as many for every thread
        splits = -(-splits // threads) * threads
    splits = min(most, splits)
    # Sums, sixteen parts of the total and the highest score of every row of every part.
    part = heads // kv_heads * min(BLOCK_ROWS, rows) * (head_dim + 16 + 1)
    parts = torch.empty(tasks * splits * part, dtype=torch.float32)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    _run(
        "a3_attend",
        query.dtype,
        query,
        _longs(query.stride()[:3]),
        _pointers(keys),
        _pointers(values),
        _longs([key.stride(1) for key in keys]),
        first,
        last,
        _pointers(shared_keys),
        _pointers(shared_values),
        counts,
        0 if shared is None else len(shared),
        *(sequences, heads, kv_heads, rows, head_dim),
        ctypes.c_float(scaling),
        _Pointer() if sinks is None else sinks,
        *(BLOCK_ROWS, splits, threads),
        parts,
        output,
        _longs([output.stride(at) for at in (0, 2, 1)]),
    )
    return output


def places(chunks: Chunks, layers: Layers) -> bool:
    """Whether :func:`place` takes these: of one dtype on the CPU, without gaps between tokens."""
    stored = [states for _, kv in chunks for states in (kv.keys, kv.values)]
    return all(states.is_contiguous() for states in stored) and _are_ours(
        [*stored, *(states for layer in layers for states in layer)]
    )


def place(
    chunks: Chunks, layers: Layers, tables: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Copy chunks into a cache and turn their keys, in fp32, on the way.

    Parameters
    ----------
    chunks : sequence of (position of the first token, ChunkKV)
    layers : sequence of (keys, values)
        The cache, from position 0 on: ``(kv_heads, tokens, head_dim)``, tokens side by side.
    tables : sequence of (cos, sin)
        Of each layer, from position 0 on: contiguous, fp32, ``(tokens, rotary_dim / 2)``.
    """
    n_layers, kv_heads, _, head_dim = chunks[0][1].keys.shape
    _run(
        "a3_place",
        layers[0][0].dtype,
        _pointers([kv.keys for _, kv in chunks]),
        _pointers([kv.values for _, kv in chunks]),
        _longs([start for start, _ in chunks]),
        _longs([kv.n_tokens for _, kv in chunks]),
        len(chunks),
        _pointers([keys for keys, _ in layers]),
        _pointers([values for _, values in layers]),
        _longs([keys.stride(0) for keys, _ in layers]),
        _pointers([cos for cos, _ in tables]),
        _pointers([sin for _, sin in tables]),
        *(n_layers, kv_heads, head_dim, tables[0][0].shape[1], torch.get_num_threads()),
    )


def shifts(
    keys: torch.Tensor, values: torch.Tensor, probes: torch.Tensor, cosines: torch.Tensor
) -> bool:
    """Whether :func:`shift` takes these: of one dtype on the CPU, a head's tokens side by side."""
    head_dim = keys.shape[-1]
    return (
        probes.shape[1] <= TILE
        and head_dim % 16 == cosines.shape[-1] % 16 == 0
        and all(states.stride()[1:] == (head_dim, 1) for states in (keys, values))
        and _are_ours([keys, values, probes])
    )


def shift(
    keys: torch.Tensor,
    values: torch.Tensor,
    share: torch.Tensor,
    probes: torch.Tensor,
    moves: tuple[torch.Tensor, torch.Tensor],
    table: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> None:
    """Move keys and values, in place, by the mean move of the probes that are like them.

    Parameters
    ----------
    keys, values : torch.Tensor
        A layer's, ``(kv_heads, tokens, head_dim)``, tokens side by side.
    share : torch.Tensor
        Of the mean move that a token follows; fp32, ``(tokens,)``.
    probes : torch.Tensor
        Values, ``(kv_heads, probes, head_dim)``, a probe's length over all heads being one.
    moves : (torch.Tensor, torch.Tensor)
        Those of the probes' keys, without position, and values; shaped like ``probes``.
    table : (cos, sin)
        Of the tokens: contiguous, fp32, ``(tokens, rotary_dim / 2)``.
    temperature : float
        Of the softmax over a token's cosine similarities to the probes.
    """
    kv_heads, tokens, head_dim = keys.shape
    key_moves, value_moves = (each.to(keys.dtype).contiguous() for each in moves)
    _run(
        "a3_shift",
        keys.dtype,
        *(keys, keys.stride(0), values, values.stride(0)),
        share,
        *(probes.contiguous(), key_moves, value_moves),
        *table,
        *(tokens, kv_heads, head_dim, table[0].shape[1], probes.shape[1]),
        ctypes.c_float(1 / (temperature * math.log(2))),
        keys.new_empty(3, kv_heads, TILE, head_dim),
        torch.get_num_threads(),
    )


def _are_ours(states: Sequence[torch.Tensor]) -> bool:
    """Whether there are loops for them, of one dtype."""
    dtype = states[0].dtype
    return (
        all(each.dtype == dtype and each.device.type == "cpu" for each in states)
        and library(dtype) is not None
    )


def _run(name: str, dtype: torch.dtype, *arguments: object) -> None:
    loops = library(dtype)
    assert loops is not None
    loops[name](
        *(
            _Pointer(one.data_ptr())
            if isinstance(one, torch.Tensor)
            else _Long(one)
            if isinstance(one, int)
            else one
            for one in arguments
        )
    )


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (_Pointer * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    return (_Long * len(numbers))(*numbers)
