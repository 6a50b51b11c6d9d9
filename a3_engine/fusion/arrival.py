"""Chunks on their way to a device: copied layer by layer while the layers below compute.

A stream of its own copies some layers of all chunks at a time. What they wait for is placed and
turned by one kernel when the pass comes to the first of them, so that the bus and the processors
work at the same time. Chunks that lie on the device already are placed at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from a3_engine.fusion.cache import FusedCache
from a3_engine.kv import ChunkKV
from a3_engine.model.rotary import Tables
from a3_engine.native import kernels_on

LAYERS_AT_ONCE = 4  # copied together: many small copies would keep the host busy


def load_by_kernel(
    cache: FusedCache,
    tables: Tables,
    chunks: Sequence[tuple[int, ChunkKV]],
    over: Sequence[tuple[int, ChunkKV]],
) -> list[ChunkKV] | None:
    """Lay chunks into a cache on one GPU, and others over them; None without a kernel for that.

    Returns
    -------
    list of ChunkKV
        The chunks on the device; whole once the cache's pass has begun its last layer.
    """
    [device, *others] = set(cache.devices)
    kernels = kernels_on(device)
    if kernels is None or others:
        return None
    arrived, copied = _copied([*chunks, *over], device)
    placed = [(start, kv) for (start, _), kv in zip([*chunks, *over], arrived, strict=True)]
    layers = list(cache.stored())
    launches = [
        kernels.placer(some, layers, tables)
        for some in (placed[: len(chunks)], placed[len(chunks) :])
        if some
    ]

    def place(layers: slice) -> None:
        for launch in launches:
            launch(layers)

    if not copied:
        place(slice(None))
        return arrived
    for at, event in copied:

        @functools.cache  # the first of the layers brings all
        def arrive(at: slice = at, event: torch.cuda.Event = event) -> None:
            torch.cuda.current_stream(device).wait_event(event)
            place(at)

        for layer in cache.layers[at]:
            layer.on_arrival = arrive
    return arrived


def _copied(
    chunks: Sequence[tuple[int, ChunkKV]], device: torch.device
) -> tuple[list[ChunkKV], list[tuple[slice, torch.cuda.Event]]]:
    """The chunks on the device, and which layers have come by which event."""
    arrived = [
        kv
        if kv.keys.device == device
        else ChunkKV(_like(kv.keys, device), _like(kv.values, device))
        for _, kv in chunks
    ]
    missing = [(kv, here) for (_, kv), here in zip(chunks, arrived, strict=True) if kv is not here]
    if not missing:
        return arrived, []
    stream = _copying(device)
    # Their memory may have served something that is still being computed.
    stream.wait_stream(torch.cuda.current_stream(device))
    events = []
    with torch.cuda.stream(stream):
        for first in range(0, len(missing[0][0].keys), LAYERS_AT_ONCE):
            some = slice(first, first + LAYERS_AT_ONCE)
            for kv, here in missing:
                here.keys[some].copy_(kv.keys[some], non_blocking=True)
                here.values[some].copy_(kv.values[some], non_blocking=True)
            events.append((some, stream.record_event()))
    for _, here in missing:
        # A request that is given up before its pass waits for no copy, and leaves its memory.
        here.keys.record_stream(stream)
        here.values.record_stream(stream)
    return arrived, events


def _like(states: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(states.shape, dtype=states.dtype, device=device)


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
