"""From stored chunks to a fused cache: allocate once, copy each chunk to its place, rotate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from a3_engine.fusion.arrival import load_by_kernel
from a3_engine.fusion.cache import FoldedLayer, FusedCache, FusedLayer
from a3_engine.kv import ChunkKV
from a3_engine.model.attention import has_window
from a3_engine.model.executor import DeviceExecutor
from a3_engine.model.kv_shape import kv_shape
from a3_engine.model.rotary import Rotation, rotate_
from a3_engine.native import loops


def allocate(
    model: PreTrainedModel, n_prompt: int, capacity: int, n_prompts: int = 1
) -> FusedCache:
    """An empty cache with room for ``capacity`` tokens, each layer on its own device."""
    decoder, dtype = model.get_decoder(), model.dtype  # which it looks for in all its weights
    layers = []
    # Layers that share another's keys and values come last, and have none.
    for layer, window, shape in zip(
        decoder.layers, has_window(model), kv_shape(decoder).layers, strict=False
    ):
        device, slots = _device(layer), n_prompts * capacity
        if device.type == "cpu":
            both = DeviceExecutor.on(device).buffers.take(slots * shape.size, dtype)
        else:
            both = torch.empty(slots * shape.size, dtype=dtype, device=device)
        sizes = [slots * shape.heads * dim for dim in (shape.key_dim, shape.value_dim)]
        keys, values = (
            part.view(n_prompts, shape.heads, capacity, dim)
            for part, dim in zip(torch.split(both, sizes), shape[1:3], strict=True)
        )
        layers.append(
            FoldedLayer(keys, values, n_prompt, n_states=shape.folds)
            if shape.folds
            else FusedLayer(keys, values, n_prompt, 0, window, shape.latent)
        )
    return FusedCache(layers)


def _device(layer: nn.Module) -> torch.device:
    """Where a layer computes; its last part is a norm as a rule, found without a long search."""
    for part in (*reversed(list(layer.children())), layer):
        for parameter in part.parameters():
            return parameter.device
    raise AssertionError("a decoder layer without parameters")


@torch.inference_mode()
def load_chunks(
    cache: FusedCache,
    rotation: Rotation,
    chunks: Sequence[tuple[int, ChunkKV]],
    over: Sequence[tuple[int, ChunkKV]] = (),
) -> list[ChunkKV]:
    """Copy chunks into the cache and turn their keys to where they now stand.

    Parameters
    ----------
    cache : FusedCache
        Freshly allocated.
    chunks : sequence of (position of the first token, ChunkKV)
        May leave gaps, which the fusion pass fills. Every prompt of the cache has them all.
    over : sequence of (position of the first token, ChunkKV)
        Laid over what stands there by then.

    Returns
    -------
    list of ChunkKV
        All of them on the cache's device, where that is what a kernel reads; else none.
    """
    if not chunks:
        return []
    stop = max(start + kv.n_tokens for start, kv in chunks)
    tables = rotation.tables_up_to(stop, cache.devices)
    shape = cache.shape
    # They turn halves, and in all layers as many components.
    widths = {cos.shape[1:] for cos, _ in tables}
    by_loops = shape.plain and not rotation.adjacent and len(widths) == 1
    if by_loops:
        arrived = load_by_kernel(cache, tables, chunks, over)
        if arrived is not None:
            return arrived
    stored = list(cache.stored())
    if by_loops and loops.places([*chunks, *over], stored):
        for prompt in range(len(stored[0][0])):
            layers = [(keys[prompt], values[prompt]) for keys, values in stored]
            for some in (chunks, over):
                if some:
                    loops.place(some, layers, tables)
        return []
    # One rotation a layer over all that was loaded costs less than one for every chunk.
    by_layer = [(start, shape.split(kv)) for start, kv in [*chunks, *over]]
    for index, ((keys, values), (cos, sin)) in enumerate(zip(stored, tables, strict=True)):
        for start, states in by_layer:
            key, value = states[index]
            keys[:, :, start : start + key.shape[1]] = key
            values[:, :, start : start + key.shape[1]] = value
        rotate_(keys[:, :, :stop], cos[:stop], sin[:stop])
    return []
