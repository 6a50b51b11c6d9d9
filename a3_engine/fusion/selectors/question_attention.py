"""Question attention over all layers (ProphetKV, arXiv 2602.02579)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.selectors.kinds import QuestionSelector
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout


@dataclass(frozen=True)
class QuestionAttention(QuestionSelector):
    """The chunk tokens that the question attends to most, averaged over heads and all layers.

    The attention is that of the question over the loaded keys, so no layer runs for all tokens.
    The paper's ratio is 0.2; ours is that of the other methods, for comparison.
    """

    name: ClassVar[str] = "question_attention"

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        return top_candidates(attention.mean(0), layout.chunk_positions, self.budget(layout))
