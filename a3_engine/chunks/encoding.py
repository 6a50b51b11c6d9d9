"""Computing a chunk's KV alone, once, behind the encode prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from a3_engine.chunks.kv import ChunkKV
from a3_engine.fusion.fuse import FusionPass, run_pass
from a3_engine.fusion.layout import Layout
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.selectors.full_reuse import FullReuse
from a3_engine.model.rotary import Rotation, rotate_


@torch.inference_mode()
def encode_chunk(
    decoder: PreTrainedModel, rotation: Rotation, ids: Sequence[int], prefix: ChunkKV | None = None
) -> ChunkKV:
    """Keys, turned back to position 0, and values of a token sequence.

    Its tokens are the rows of a fusion pass behind the loaded prefix.

    Parameters
    ----------
    decoder : PreTrainedModel
        The model without its language-model head, with the hooks of the fusion pass.
    ids : sequence of int
        Token ids of the chunk.
    prefix : ChunkKV or None
        What the chunk is computed behind; it is not part of the result.

    Returns
    -------
    ChunkKV
        In the model's dtype, on its device.
    """
    behind = prefix.n_tokens if prefix is not None else 0
    n_tokens = behind + len(ids)
    cache = allocate(decoder, n_tokens, n_tokens)
    if prefix is not None:
        load_chunks(cache, rotation, [(0, prefix)])
    own = torch.arange(behind, n_tokens)
    layout = Layout(n_tokens, (), behind, fresh=own, question=own, reused=behind)
    FusionPass(cache, layout, FullReuse()).last_only = True
    # The prefix's rows are cut off ahead of the first layer, so that any token does for them.
    run_pass(decoder, [ids[0]] * behind + list(ids), cache)

    device = decoder.get_input_embeddings().weight.device
    keys, values = [], []
    for layer, (cos, sin) in zip(cache.layers, rotation.tables(own, cache.devices), strict=True):
        key, value = (states[0, :, behind:] for states in layer.stored())
        rotate_(key, cos, sin, inverse=True)
        keys.append(key.to(device))
        values.append(value.to(device))
    return ChunkKV(torch.stack(keys), torch.stack(values))
