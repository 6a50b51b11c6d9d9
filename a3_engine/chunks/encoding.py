"""Computing a chunk's KV alone, once, behind the encode prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from a3_engine.chunks.kv import ChunkKV
from a3_engine.model.caching import with_cache
from a3_engine.model.rotary import Rotation, rotate_


def kv_shape(decoder: PreTrainedModel, n_tokens: int) -> tuple[int, int, int, int]:
    """``(layers, kv_heads, tokens, head_dim)`` of the keys and values of so many tokens."""
    config = decoder.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return len(decoder.layers), config.num_key_value_heads, n_tokens, head_dim


@torch.inference_mode()
def encode_chunk(
    decoder: PreTrainedModel, rotation: Rotation, ids: Sequence[int], prefix: ChunkKV | None = None
) -> ChunkKV:
    """Keys, turned back to position 0, and values of a token sequence.

    Parameters
    ----------
    decoder : PreTrainedModel
        The model without its language-model head.
    ids : sequence of int
        Token ids of the chunk.
    prefix : ChunkKV or None
        What the chunk is computed behind; it is not part of the result.

    Returns
    -------
    ChunkKV
        In the model's dtype, on its device.
    """
    device = decoder.get_input_embeddings().weight.device
    devices = [next(layer.parameters()).device for layer in decoder.layers]
    # Without a config no layer becomes a sliding one, which would drop tokens outside its window.
    cache = DynamicCache()
    n_prefix = prefix.n_tokens if prefix is not None else 0
    tables = rotation.tables(torch.arange(n_prefix + len(ids)))
    if prefix is not None:
        for index, ((cos, sin), home) in enumerate(zip(tables, devices, strict=True)):
            key = prefix.keys[index, None].to(home, copy=True)
            rotate_(key, cos[:n_prefix].to(home), sin[:n_prefix].to(home))
            cache.update(key, prefix.values[index, None].to(home), index)
    decoder(input_ids=torch.tensor([list(ids)], device=device), **with_cache(decoder, cache))

    keys, values = [], []
    for layer, (cos, sin) in zip(cache.layers, tables, strict=True):
        key = layer.keys[0, :, n_prefix:].clone()
        rotate_(key, cos[n_prefix:].to(key.device), sin[n_prefix:].to(key.device), inverse=True)
        keys.append(key.to(device))
        values.append(layer.values[0, :, n_prefix:].to(device))
    return ChunkKV(torch.stack(keys), torch.stack(values))
