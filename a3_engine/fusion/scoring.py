"""What the question attends to: one cheap pass of the fresh tokens over the loaded cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from a3_engine.devices import send
from a3_engine.fusion.attention_sums import AttentionSums, Pool
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fusion_pass import FusionPass
from a3_engine.model.hooks import run_pass
from a3_engine.model.latent import expanded
from a3_engine.model.masks import Observer, RowMask


class _Seen(Exception):
    """Leaves the forward after the last layer that is looked at.

    Raised by an observer, inside that layer's attention: nothing else ends a model's forward early.
    Caught below, right around the forward.
    """


def _up_to(last: int, observer: Observer) -> Observer:
    """The observer of a pass that ends with this layer's attention."""

    def observe(
        layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        observer(layer, query, key, rows, scaling)
        if layer == last:
            raise _Seen

    return observe


@torch.inference_mode()
def question_attention(
    decoder: PreTrainedModel,
    cache: FusedCache,
    fusion: FusionPass,
    ids: Sequence[int],
    layers: Sequence[int],
    pool: Pool,
) -> torch.Tensor:
    """The question's attention to every token, shape ``(layers, tokens)``, fp32.

    The cache is pending again afterwards; the fresh tokens that this pass wrote are written anew
    by the fusion pass.
    """
    sums = AttentionSums(fusion.layout, layers, pool)
    with fusion.only_fresh(_up_to(layers[-1], sums.observe)), suppress(_Seen):
        run_pass(decoder, [ids], cache)
    cache.rewind()
    return sums.total()


@torch.inference_mode()
def question_alone(
    decoder: PreTrainedModel,
    cache: FusedCache,
    fusion: FusionPass,
    ids: Sequence[int],
    layers: Sequence[int],
    pool: Pool,
) -> torch.Tensor:
    """The same for a question that has seen no chunk: its queries meet the loaded keys at the end.

    Returns
    -------
    torch.Tensor
        fp32, ``(layers, tokens)``.
    """
    layout = fusion.layout
    sums = AttentionSums(layout, layers, pool)

    def observe(
        layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        loaded = expanded(decoder.layers[layer], *cache.layers[layer].stored())[0].clone()
        positions = rows.key_positions
        assert positions is not None
        loaded.index_copy_(2, send(positions, key.device), key)
        sums.observe(layer, query, loaded, rows, scaling)

    without_chunks = cache.subset(layout.with_chunk_tokens(layout.chunk_positions[:0]))
    alone = FusionPass(without_chunks, layout)
    with alone.only_fresh(_up_to(layers[-1], observe)), suppress(_Seen):
        run_pass(decoder, [ids], without_chunks)
    return sums.total()
