"""Computing the KV of chunks alone, once, after the encode prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from a3_engine.fusion.fusion_pass import FusionPass
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.kv import ChunkKV, KVShape
from a3_engine.layout import Layout
from a3_engine.model.executor import DeviceExecutor
from a3_engine.model.hooks import run_pass
from a3_engine.model.kv_shape import kv_shape
from a3_engine.model.rotary import Rotation, rotate_

# Rows of a pass: short chunks are computed together, since few rows do not keep a device busy.
CPU_BATCH_ROWS, BATCH_ROWS = 1024, 4096
# Lengths go in steps: libraries keep a kernel and scratch for every shape that they meet.
STEP = 16
LEAST_FILLED = 0.8  # of a batch's longest chunk

Item = TypeVar("Item")


class ChunkEncoder:
    """Computes the chunks of one model: the `Encoder` of a chunk library.

    Parameters
    ----------
    decoder : PreTrainedModel
        The model without its language-model head, with the hooks of the fusion pass.
    rotation : Rotation
    executor : DeviceExecutor
        Where the model computes.
    """

    def __init__(
        self, decoder: PreTrainedModel, rotation: Rotation, executor: DeviceExecutor
    ) -> None:
        self._decoder, self._rotation, self._executor = decoder, rotation, executor

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @property
    def dtype(self) -> str:
        return str(self._decoder.dtype)

    @property
    def shape(self) -> KVShape:
        return kv_shape(self._decoder)

    def batches(self, items: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[Item]]:
        """Items whose chunks are computed together."""
        return batches(items, lengths, self.device)

    def encode(
        self, chunks: Sequence[Sequence[int]], prefix: ChunkKV | None
    ) -> tuple[list[ChunkKV], float]:
        """See `encode_chunks`; with the time, by `perf_counter`, when their computation began."""

        def work() -> tuple[list[ChunkKV], float]:
            started = time.perf_counter()
            return encode_chunks(self._decoder, self._rotation, chunks, prefix), started

        return self._executor.run(work)


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

    Their tokens are the rows of a fusion pass after the loaded prefix; shorter ones are filled up
    on the right, where nothing that counts attends to.

    Parameters
    ----------
    decoder : PreTrainedModel
        The model without its language-model head, with the hooks of the fusion pass.
    chunks : sequence of sequence of int
        Token ids, at least one chunk.
    prefix : ChunkKV or None
        What each is computed after; it is not part of the results.

    Returns
    -------
    list of ChunkKV
        In the model's dtype, on its device.
    """
    n_before = prefix.n_tokens if prefix is not None else 0
    longest = n_before + max(len(ids) for ids in chunks)
    n_tokens = STEP * -(-longest // STEP)
    cache = allocate(decoder, n_tokens, n_tokens, len(chunks))
    if prefix is not None:
        load_chunks(cache, rotation, [(0, prefix)])
    own = torch.arange(n_before, n_tokens)
    layout = Layout(n_tokens, (), n_before, fresh=own, question=own, reused=n_before)
    fusion = FusionPass(cache, layout)
    fusion.recompute(own[:0])
    fusion.last_token_only = True
    # The prefix's rows are cut off ahead of the first layer, so that any token does for them.
    rows = [[ids[0]] * n_before + list(ids) for ids in chunks]
    run_pass(decoder, [ids + ids[-1:] * (n_tokens - len(ids)) for ids in rows], cache)

    device = decoder.get_input_embeddings().weight.device
    layers = []
    for layer, (cos, sin) in zip(cache.layers, rotation.tables(own, cache.devices), strict=True):
        key, value = (states[:, :, n_before:] for states in layer.stored())
        rotate_(key, cos, sin, inverse=True)
        layers.append((key, value))
    return [
        kv_shape(decoder).chunk(
            [(key[place, :, : len(ids)], value[place, :, : len(ids)]) for key, value in layers],
            device,
        )
        for place, ids in enumerate(chunks)
    ]
