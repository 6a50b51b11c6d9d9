"""Which keys and values a model keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from a3_engine.devices import input_device
from a3_engine.errors import UnsupportedModelError
from a3_engine.kv import KVShape, LayerShape
from a3_engine.model.cache_argument import cache_in, with_cache
from a3_engine.model.folding import OrdinaryFolding
from a3_engine.model.latent import is_latent

NOTHING = LayerShape(0, 0, 0)  # a layer that keeps nothing of its own


def kv_shape(decoder: PreTrainedModel) -> KVShape:
    """What a decoder keeps of each token."""
    return _shown(decoder)[0]


def mixers(decoder: PreTrainedModel) -> list[nn.Module | None]:
    """Of each layer that folds the module that does; see :mod:`a3_engine.model.folding`."""
    return _shown(decoder)[1]


def token_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, over all layers."""
    return kv_shape(model.get_decoder()).token_size * model.dtype.itemsize


def ordinary_cache(decoder: PreTrainedModel) -> Cache:
    """An empty cache that is not fused, and forgets nothing.

    One of transformers' own with a config drops what lies outside a sliding window.
    """
    shapes = kv_shape(decoder).layers
    if all(shape.attends for shape in shapes):
        return DynamicCache()
    return Cache(
        layers=[OrdinaryFolding(each) if each.folds else DynamicLayer() for each in shapes]
    )


@torch.inference_mode()
def _shown(decoder: PreTrainedModel) -> tuple[KVShape, list[nn.Module | None]]:
    """Both, of one token that the decoder is asked for once."""
    known: tuple[KVShape, list[nn.Module | None]] | None = getattr(decoder.layers, "_a3_kept", None)
    if known is not None:
        return known
    cache = DynamicCache(config=decoder.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(decoder))
    with _cached(decoder.layers) as cached:
        decoder(input_ids=token, **with_cache(decoder, cache), use_cache=True)
    shapes: list[LayerShape] = []
    folding: list[nn.Module | None] = [None] * len(decoder.layers)
    for layer, kept in zip(decoder.layers, cache.layers, strict=False):
        keys, values = getattr(kept, "keys", None), getattr(kept, "values", None)
        if keys is None or values is None:  # it keeps nothing, or a state
            shapes.append(NOTHING)
            continue
        if latent := is_latent(layer):
            keys, values = values, keys
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], latent))
    for index, kept in enumerate(cache.layers):
        if isinstance(kept, LinearAttentionLayer):
            if shapes[index] != NOTHING or len(cached[index]) != 1:
                raise UnsupportedModelError(f"its layer {index} folds tokens beside its attention")
            ((folding[index], size),) = cached[index].items()
            shapes[index] = _of_inputs(size, shapes)._replace(folds=kept.number_of_states)
    while shapes[-1] == NOTHING and cached[len(shapes) - 1]:
        shapes.pop()  # it attends to what another keeps; such layers come last
    known = KVShape(tuple(shapes)), folding
    decoder.layers._a3_kept = known  # type: ignore[union-attr, assignment]
    return known


def _of_inputs(size: int, layers: Sequence[LayerShape]) -> LayerShape:
    """So many numbers, cut into keys and values as large as the smallest piece of attention's."""
    attention = [layer for layer in layers if layer.attends]
    key_dim = math.gcd(*(layer.key_dim for layer in attention)) or size
    value_dim = math.gcd(*(layer.value_dim for layer in attention))
    return LayerShape(math.ceil(size / (key_dim + value_dim)), key_dim, value_dim)


@contextmanager
def _cached(layers: nn.ModuleList) -> Iterator[list[dict[nn.Module, int]]]:
    """Meanwhile notes which parts of each layer are given a cache, and the size of their input."""
    seen: list[dict[nn.Module, int]] = [{} for _ in layers]

    def note(part: nn.Module, args: Any, kwargs: dict[str, Any], index: int) -> None:
        if cache_in(kwargs) is not None:
            states = args[0] if args else kwargs["hidden_states"]
            seen[index][part] = states.shape[-1]

    handles = [
        part.register_forward_pre_hook(partial(note, index=index), with_kwargs=True)
        for index, layer in enumerate(layers)
        for part in layer.children()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
