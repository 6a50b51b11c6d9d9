"""A³: the tokens that the question attends to (arXiv 2511.17560)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.fusion_pass import States
from a3_engine.fusion.selectors.kinds import LayerSelector
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout


@dataclass(frozen=True)
class A3(LayerSelector):
    """Question attention at one early layer, one softmax over all heads together.

    Follows the authors' code (yczhounlp/ragkv at 8f3a325): heads are flattened into one vector, so
    that a score is the sum of the heads' products over ``sqrt(heads * head_dim)``; the softmax runs
    over all tokens after the prefix; scores are summed over the question and average-pooled.

    Parameters
    ----------
    ratio : float
        Share of the tokens before the question to recompute. As in the authors' code the prefix
        counts towards the budget, though its tokens are never picked.
    layer : int
        Layer whose queries and keys are compared. The layers before it, and this layer's
        projections, are computed for all tokens.
    pool : int
        Width of the average pooling, odd; zeros beyond the ends count in the mean. 1 switches it
        off.
    """

    name: ClassVar[str] = "a3"
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"The pooling width is odd and positive, not {self.pool}.")

    def select(self, layout: Layout, fresh: States, stored: States) -> torch.Tensor:
        assert fresh.query is not None
        device = fresh.key.device
        question = layout.question.to(device)
        heads, _, head_dim = fresh.query.shape[1:]
        group = heads // fresh.key.shape[1]

        query = fresh.query[0, :, question].transpose(0, 1)
        # Adding up the queries of a group gives the same sum over heads as repeating its key.
        query = query.reshape(len(query), -1, group, head_dim).sum(2).flatten(1)
        key = fresh.key[0, :, layout.prefix_tokens :].transpose(0, 1).flatten(1)
        logits = (query @ key.T).float() / math.sqrt(heads * head_dim)

        behind_prefix = torch.arange(layout.prefix_tokens, layout.n_tokens, device=device)
        # Causal within the question only: its words may also stand before the documents.
        asks = torch.isin(behind_prefix, question)
        later = asks & (behind_prefix > question[:, None])
        logits[: len(question)].masked_fill_(later, float("-inf"))
        scores = torch.softmax(logits, dim=-1).sum(0)
        scores[asks] = 0.0
        pooled = torch.nn.functional.avg_pool1d(
            scores[None, None], self.pool, stride=1, padding=self.pool // 2
        )[0, 0]
        by_position = torch.nn.functional.pad(pooled, (layout.prefix_tokens, 0))
        return top_candidates(by_position, layout.chunk_positions, self.budget(layout))
