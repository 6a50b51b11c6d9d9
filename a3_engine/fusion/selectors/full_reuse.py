"""Full reuse: cached chunks as they are (Prompt Cache, arXiv 2311.04934, without its schema)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.selectors.kinds import BoundarySelector
from a3_engine.layout import Layout


@dataclass(frozen=True)
class FullReuse(BoundarySelector):
    """Recomputes no chunk token: the fastest method, and the least faithful."""

    name: ClassVar[str] = "full_reuse"
    ratio: float = 0.0

    def select(self, layout: Layout) -> torch.Tensor:
        return torch.empty(0, dtype=torch.long)
