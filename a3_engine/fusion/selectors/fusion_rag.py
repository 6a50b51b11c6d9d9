"""FusionRAG's query-guided selection (arXiv 2601.12904, SIGMOD 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.selectors.kinds import QuestionSelector
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout


@dataclass(frozen=True)
class FusionRAG(QuestionSelector):
    """The chunk tokens that the question's last layer attends to; it was prefilled without them.

    The paper also encodes every chunk anew after the chunks most similar to it, which is left out:
    chunks are stored as every other method finds them.
    """

    name: ClassVar[str] = "fusion_rag"
    alone: ClassVar[bool] = True

    def layers(self, n_layers: int) -> range:
        return range(n_layers - 1, n_layers)

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        return top_candidates(attention.sum(0), layout.chunk_positions, self.budget(layout))
