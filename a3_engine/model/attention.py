"""Attention for scattered rows: the one place where the fusion pass meets the model's attention.

transformers lets a program register attention functions by name; every Llama-like model calls the
registered function with the queries after rotation and the keys and values that the cache returned.
The function here does ordinary attention, by the implementation that the model had before, unless
the layer's `attention_mask` is a :class:`Rows`: then the rows stand at arbitrary positions and see
exactly the keys at positions not after their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Rows are attended in blocks, so that a block touches only the keys up to its last row. Blocks of
# 64 sorted rows took 35 ms where one block of 680 rows took 52 (4,200 keys, 2 CPU cores).
CPU_BLOCK_ROWS = 64
PREFIX = "a3_"

Observer = Callable[[int, torch.Tensor, torch.Tensor, "Rows", float], None]


@dataclass(frozen=True)
class Rows:
    """Stands in for the attention mask of one layer in a fusion pass.

    Parameters
    ----------
    positions : torch.Tensor
        Sorted positions of the query rows, shape ``(rows,)``, on the CPU.
    key_positions : torch.Tensor or None
        Sorted positions of the keys, on the CPU; None where key ``j`` stands at position ``j``.
    observer : callable or None
        Called with ``(layer's index, query, key, rows, scaling)`` before the attention is computed.
    """

    positions: torch.Tensor
    key_positions: torch.Tensor | None = None
    observer: Observer | None = None

    def keys_before(self, positions: torch.Tensor) -> torch.Tensor:
        """How many keys stand before each of these positions."""
        if self.key_positions is None:
            return positions.clamp(min=0)
        return torch.searchsorted(self.key_positions, positions)


class Captured(Exception):
    """Carries a layer's query, key and value out of the attention function, before attention."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__("captured")
        self.states = (query, key, value)


class Capture:
    """Stands in for the attention mask where only the projected states are wanted."""


def install(model: PreTrainedModel) -> None:
    """Route the model's attention through this module; ordinary calls behave as before."""
    current = model.config._attn_implementation
    if current.startswith(PREFIX):
        return
    name = PREFIX + current

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(attention_mask, Rows):
            return attend_rows(module, query, key, value, attention_mask, **kwargs), None
        if isinstance(attention_mask, Capture):
            raise Captured(query, key, value)
        ordinary = (
            inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
            if current == "eager"
            else ALL_ATTENTION_FUNCTIONS[current]
        )
        return ordinary(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention)
    if current in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[current])
    model.set_attn_implementation(name)


def attend_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Attention of scattered rows over the whole cache, with an exact mask.

    Parameters
    ----------
    query : torch.Tensor
        Shape ``(1, heads, rows, head_dim)``, rotated to the rows' positions.
    key, value : torch.Tensor
        Shape ``(1, kv_heads, tokens, head_dim)``.
    rows : Rows
        Where the rows and the keys stand.
    scaling, sliding_window, softcap
        As the model passes them to its attention function.

    Returns
    -------
    torch.Tensor
        Shape ``(1, rows, heads, head_dim)``.
    """
    if rows.observer is not None:
        rows.observer(module.layer_idx, query, key, rows, scaling)  # type: ignore[arg-type]
    n_rows = query.shape[2]
    visible = rows.keys_before(rows.positions + 1)
    block = CPU_BLOCK_ROWS if query.device.type == "cpu" else n_rows
    # One list on the host: slicing by tensor values would synchronise once a block on CUDA.
    ends = visible.tolist() if block < n_rows else [1] * (n_rows - 1) + [key.shape[2]]
    visible = visible.to(query.device)
    window_starts = [0] * n_rows
    if sliding_window:
        outside = rows.keys_before(rows.positions - sliding_window + 1)
        window_starts = outside.tolist() if block < n_rows else window_starts
        outside = outside.to(query.device)
    if softcap is None and not _multiplies_faster(query):
        attend = _attend_fused
    else:
        attend = partial(_attend_plain, softcap=softcap)
    output = torch.empty_like(query)
    for start in range(0, n_rows, block):
        stop = min(start + block, n_rows)
        first, last = window_starts[start], ends[stop - 1]
        # Without a window, keys up to the block's first row are visible to all its rows.
        masked_from = first if sliding_window else ends[start] - 1
        where = torch.arange(masked_from, last, device=query.device)
        hidden = where >= visible[start:stop, None]
        if sliding_window:
            hidden |= where < outside[start:stop, None]
        output[:, :, start:stop] = attend(
            query[:, :, start:stop],
            key[:, :, first:last],
            value[:, :, first:last],
            hidden,
            scaling,
        )
    return output.transpose(1, 2)


def _multiplies_faster(query: torch.Tensor) -> bool:
    """Whether plain products beat the fused kernel: bf16 on a CPU that multiplies it natively.

    680 rows over 4,200 keys: 23 ms against 35, with a relative error of 0.0036 against 0.0021
    (2 cores with AVX512-bf16; the rounding of bf16 itself is 0.002).
    """
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and torch.cpu._is_avx512_bf16_supported()


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    visible = torch.nn.functional.pad(~hidden, (key.shape[2] - hidden.shape[1], 0), value=True)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
    )


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Grouped matrix products; also for softcapped scores (Gemma 2), which no fused kernel has."""
    _, heads, n_rows, head_dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    grouped = (query * scaling).reshape(kv_heads, heads // kv_heads * n_rows, head_dim)
    scores = torch.matmul(grouped, key[0].transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    by_row = scores.view(kv_heads, -1, n_rows, n_keys)
    by_row[..., n_keys - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)  # computes in fp32 whatever the dtype
    return torch.matmul(weights, value[0]).view(1, heads, n_rows, head_dim)


def has_window(model: PreTrainedModel) -> list[bool]:
    """Which layers attend within a sliding window only."""
    config = model.config.get_text_config()
    if types := getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in types]
    return [bool(getattr(config, "sliding_window", None))] * config.num_hidden_layers


def project(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a decoder layer after rotation, without running its attention.

    Leaving the layer by an exception from the attention function works for every architecture:
    norms before rotation, fused projections and partial rotation are the model's own code.

    Returns
    -------
    query : ``(1, heads, tokens, head_dim)``; key, value : ``(1, kv_heads, tokens, head_dim)``
    """
    try:
        layer.forward(*args, **{**kwargs, "attention_mask": Capture(), "past_key_values": None})
    except Captured as captured:
        return captured.states
    raise RuntimeError(
        f"{type(layer).__name__} did not call the registered attention function; "
        "was the model's attention implementation changed after the engine was built?"
    )
