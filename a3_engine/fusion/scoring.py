"""What the question attends to: one cheap pass of the fresh tokens over the loaded cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fuse import FusionPass, run_pass
from a3_engine.fusion.layout import Layout
from a3_engine.model.attention import multiply
from a3_engine.model.rows import Rows


class _Seen(Exception):
    """Leaves the forward pass behind the last layer that is looked at."""


class AttentionSums:
    """Collects the question's attention weights, layer by layer.

    Parameters
    ----------
    layout : Layout
        Its fresh tokens are the rows of the pass; those of the question are looked at.
    layers : range
        The layers to look at.
    """

    def __init__(self, layout: Layout, layers: range) -> None:
        self._layers = layers
        self._index = torch.searchsorted(layout.fresh, layout.question)
        # Causal within the question only: its words may also stand ahead of the documents.
        self._first = int(layout.question[0])
        where = torch.arange(self._first, layout.n_tokens)
        self._after = torch.isin(where, layout.question) & (where > layout.question[:, None])
        self.by_layer: list[torch.Tensor] = []

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: Rows, scaling: float
    ) -> None:
        """Add one layer; query and key as the attention function gets them."""
        if layer not in self._layers:
            return
        kv_heads, n_tokens, head_dim = key.shape[1:]
        question = query[0, :, self._index.to(query.device)] * scaling
        group, n_question = question.shape[0] // kv_heads, question.shape[1]
        scores = query.new_empty(kv_heads, group * n_question, n_tokens)
        multiply(question.reshape(kv_heads, -1, head_dim), key[0].transpose(1, 2), scores)
        scores.view(kv_heads, group, n_question, n_tokens)[..., self._first :].masked_fill_(
            self._after.to(scores.device), float("-inf")
        )
        weights = torch.softmax(scores, dim=-1).flatten(0, 1)
        # A product adds up in fp32 without a copy of the weights in fp32, as `mean` would make.
        share = weights.new_full((1, len(weights)), 1 / len(weights))
        self.by_layer.append((share @ weights)[0].float())
        if layer == self._layers[-1]:
            raise _Seen

    def total(self) -> torch.Tensor:
        """The sums on one device, ``(layers, tokens)``."""
        return torch.stack([row.to(self.by_layer[0].device) for row in self.by_layer])


@torch.inference_mode()
def question_attention(
    decoder: PreTrainedModel,
    cache: FusedCache,
    fusion: FusionPass,
    ids: Sequence[int],
    layers: range,
) -> torch.Tensor:
    """The question's attention to every token, shape ``(layers, tokens)``, fp32.

    The cache is pending again afterwards; the fresh tokens that this pass wrote are written anew
    by the fusion pass.
    """
    sums = AttentionSums(fusion.layout, layers)
    with fusion.only_fresh(sums.observe), suppress(_Seen):
        run_pass(decoder, ids, cache)
    cache.rewind()
    return sums.total()


@torch.inference_mode()
def question_alone(
    decoder: PreTrainedModel,
    cache: FusedCache,
    fusion: FusionPass,
    ids: Sequence[int],
    layers: range,
) -> torch.Tensor:
    """The same for a question that has seen no chunk: its queries meet the loaded keys at the end.

    Returns
    -------
    torch.Tensor
        fp32, ``(layers, tokens)``.
    """
    layout = fusion.layout
    sums = AttentionSums(layout, layers)

    def observe(
        layer: int, query: torch.Tensor, key: torch.Tensor, rows: Rows, scaling: float
    ) -> None:
        loaded = cache.layers[layer].stored()[0].clone()
        positions = rows.key_positions
        assert positions is not None
        loaded[:, :, positions.to(key.device)] = key
        sums.observe(layer, query, loaded, rows, scaling)

    without_chunks = cache.narrowed(layout.with_chunk_tokens(layout.chunk_positions[:0]))
    alone = FusionPass(without_chunks, layout, fusion.selector)
    with alone.only_fresh(observe), suppress(_Seen):
        run_pass(decoder, ids, without_chunks)
    return sums.total()
