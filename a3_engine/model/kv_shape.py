"""Which keys and values a model keeps."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from a3_engine.devices import input_device
from a3_engine.kv import KVShape, LayerShape
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.latent import is_latent


@torch.inference_mode()
def kv_shape(decoder: PreTrainedModel) -> KVShape:
    """What a decoder keeps of each token: of one token it shows, and is asked once."""
    known: KVShape | None = getattr(decoder.layers, "_a3_kv_shape", None)
    if known is None:
        cache = DynamicCache()
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(decoder))
        decoder(input_ids=token, **with_cache(decoder, cache), use_cache=True)
        shapes = []
        for layer, kept in zip(decoder.layers, cache.layers, strict=False):
            first, second = kept.keys, kept.values
            if latent := is_latent(layer):
                first, second = second, first
            shapes.append(LayerShape(first.shape[1], first.shape[3], second.shape[3], latent))
        known = KVShape(tuple(shapes))
        decoder.layers._a3_kv_shape = known  # type: ignore[union-attr, assignment]
    return known


def token_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, over all layers."""
    return kv_shape(model.get_decoder()).token_size * model.dtype.itemsize
