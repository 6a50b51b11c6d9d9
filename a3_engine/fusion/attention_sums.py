"""What a question attends to, collected while a pass computes its attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from a3_engine.devices import send
from a3_engine.layout import Layout
from a3_engine.model.attention import multiply
from a3_engine.model.masks import RowMask

Pool = Literal["mean", "max"]


class AttentionSums:
    """Collects the question's attention weights, layer by layer.

    Parameters
    ----------
    layout : Layout
        On the device of the first layer. Its question has to be among the rows of the pass.
    layers : collection of int
        The layers to look at.
    pool : str
        How the question's tokens are taken together, each averaged over the heads before: their
        ``"mean"``, or the ``"max"`` of what any of them attends to.
    """

    def __init__(self, layout: Layout, layers: Collection[int], pool: Pool) -> None:
        self._layers, self._pool = layers, pool
        self._question = layout.question
        self._first, self._after = layout.question_start, layout.later_in_question
        self._rows: RowMask | None = None
        self._by_layer: dict[int, torch.Tensor] = {}

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        """Add one layer; query and key as the attention function gets them."""
        if layer not in self._layers:
            return
        kv_heads, n_tokens, head_dim = key.shape[1:]
        if self._rows is not rows:
            self._rows, self._among = rows, torch.searchsorted(rows.positions, self._question)
        index = send(self._among, query.device)
        question = query[0, :, index] * scaling
        heads, n_question = question.shape[:2]
        scores = query.new_empty(kv_heads, heads // kv_heads * n_question, n_tokens)
        multiply(question.reshape(kv_heads, -1, head_dim), key[0].transpose(1, 2), scores)
        scores.view(heads, n_question, n_tokens)[..., self._first :].masked_fill_(
            send(self._after, scores.device), float("-inf")
        )
        weights = torch.softmax(scores, dim=-1, out=scores).view(heads, n_question * n_tokens)
        # A product adds up in fp32 without a copy of the weights in fp32, as `mean` would make.
        share = weights.new_full((1, heads), 1 / heads)
        by_token = (share @ weights).view(n_question, n_tokens).float()
        self._by_layer[layer] = by_token.mean(0) if self._pool == "mean" else by_token.amax(0)

    def of(self, layer: int) -> torch.Tensor:
        """What was seen in a layer, ``(tokens,)``."""
        return self._by_layer[layer]

    def total(self) -> torch.Tensor:
        """What was seen in all of them, on one device, ``(layers, tokens)``."""
        rows = list(self._by_layer.values())
        return torch.stack([send(row, rows[0].device) for row in rows])
