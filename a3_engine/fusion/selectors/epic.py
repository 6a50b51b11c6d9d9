"""EPIC: the first tokens of every chunk (LegoLink, arXiv 2410.15332)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.selectors.kinds import BoundarySelector
from a3_engine.layout import Layout


@dataclass(frozen=True)
class Epic(BoundarySelector):
    """Recomputes each chunk's attention sink, its first tokens; the first chunk has a real one.

    Parameters
    ----------
    ratio : float
        Share of the chunk tokens, spread evenly over the chunks, so that methods compare at equal
        cost.
    first : int or None
        A fixed number of tokens a chunk instead, as in the paper, whose default is 16.
    """

    name: ClassVar[str] = "epic"
    first: int | None = None

    def select(self, layout: Layout) -> torch.Tensor:
        behind_first = layout.chunks if layout.reused else layout.chunks[1:]
        per_chunk = self.first or self.budget(layout) // max(len(behind_first), 1)
        starts = [
            torch.arange(span.start, min(span.start + per_chunk, span.stop))
            for span in behind_first
        ]
        return torch.cat(starts) if starts else torch.empty(0, dtype=torch.long)
