"""Random tokens: the control that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.selectors.kinds import BoundarySelector
from a3_engine.layout import Layout


@dataclass(frozen=True)
class Random(BoundarySelector):
    """Chunk tokens drawn without replacement, the same ones for the same seed and prompt length."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def select(self, layout: Layout) -> torch.Tensor:
        candidates = layout.chunk_positions
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(candidates), generator=generator)
        return candidates[order[: self.budget(layout)]]
