"""Our own method: recompute what the question attends to, and mend the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from a3_engine.fusion.drift import DriftRepair
from a3_engine.fusion.layout import Layout
from a3_engine.fusion.selectors.base import QuestionSelector, top_candidates


@dataclass(frozen=True)
class Mend(QuestionSelector):
    """Question attention over the lower layers, and drift repair of what is not recomputed.

    Tokens whose stored KV is exact already, those of a first chunk that stands just behind what it
    was computed behind, are not picked.

    Parameters
    ----------
    ratio : float
        Share of the chunk tokens to recompute.
    repair : DriftRepair or None
        How the other chunk tokens are moved; see :mod:`a3_engine.fusion.drift`.
    depth : float
        Share of the layers, from the first, whose attention is looked at; the scoring pass ends
        there.
    """

    name: ClassVar[str] = "mend"
    repair: DriftRepair | None = field(default_factory=DriftRepair)
    depth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.depth <= 1.0:
            raise ValueError(f"The depth of scoring lies above 0 and up to 1, not at {self.depth}.")

    def layers(self, n_layers: int) -> range:
        return range(math.ceil(n_layers * self.depth))

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        return top_candidates(attention.mean(0), layout.inexact_positions, self.budget(layout))
