"""Computing the KV of chunks alone, once, behind the encode prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from a3_engine.chunks.kv import ChunkKV, kv_shape
from a3_engine.fusion.fuse import FusionPass, run_pass
from a3_engine.fusion.layout import Layout
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.selectors.full_reuse import FullReuse
from a3_engine.model.rotary import Rotation, rotate_

# Rows of a pass: short chunks are computed together, since few rows do not keep a device busy.
CPU_BATCH_ROWS, BATCH_ROWS = 1024, 4096
LEAST_FILLED = 0.8  # of a batch's longest chunk

Item = TypeVar("Item")


def batches(
    items: Sequence[Item], lengths: Sequence[int], device: torch.device
) -> Iterator[list[Item]]:
    """Items whose chunks are computed together: of similar lengths, the shortest first."""
    most = CPU_BATCH_ROWS if device.type == "cpu" else BATCH_ROWS
    batch: list[Item] = []
    shortest = 0
    for length, item in sorted(zip(lengths, items, strict=True), key=lambda each: each[0]):
        if batch and ((len(batch) + 1) * length > most or shortest < LEAST_FILLED * length):
            yield batch
            batch = []
        shortest = shortest if batch else length
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def encode_chunks(
    decoder: PreTrainedModel,
    rotation: Rotation,
    chunks: Sequence[Sequence[int]],
    prefix: ChunkKV | None = None,
) -> list[ChunkKV]:
    """Keys, turned back to position 0, and values of token sequences, each computed alone.

    Their tokens are the rows of a fusion pass behind the loaded prefix; shorter ones are filled up
    on the right, where nothing that counts attends to.

    Parameters
    ----------
    decoder : PreTrainedModel
        The model without its language-model head, with the hooks of the fusion pass.
    chunks : sequence of sequence of int
        Token ids, at least one chunk.
    prefix : ChunkKV or None
        What each is computed behind; it is not part of the results.

    Returns
    -------
    list of ChunkKV
        In the model's dtype, on its device.
    """
    behind = prefix.n_tokens if prefix is not None else 0
    n_tokens = behind + max(len(ids) for ids in chunks)
    cache = allocate(decoder, n_tokens, n_tokens, len(chunks))
    if prefix is not None:
        load_chunks(cache, rotation, [(0, prefix)])
    own = torch.arange(behind, n_tokens)
    layout = Layout(n_tokens, (), behind, fresh=own, question=own, reused=behind)
    FusionPass(cache, layout, FullReuse()).last_only = True
    # The prefix's rows are cut off ahead of the first layer, so that any token does for them.
    rows = [[ids[0]] * behind + list(ids) for ids in chunks]
    run_pass(decoder, [ids + ids[-1:] * (n_tokens - len(ids)) for ids in rows], cache)

    device = decoder.get_input_embeddings().weight.device
    layers = []
    for layer, (cos, sin) in zip(cache.layers, rotation.tables(own, cache.devices), strict=True):
        key, value = (states[:, :, behind:] for states in layer.stored())
        rotate_(key, cos, sin, inverse=True)
        layers.append((key, value))
    return [
        kv_shape(decoder).chunk(
            [(key[place, :, : len(ids)], value[place, :, : len(ids)]) for key, value in layers],
            device,
        )
        for place, ids in enumerate(chunks)
    ]
