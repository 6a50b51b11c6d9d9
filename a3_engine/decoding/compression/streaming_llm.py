"""StreamingLLM: attention sinks and the most recent tokens (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.decoding.compression.base import Compression
from a3_engine.model.masks import RowMask


@dataclass(frozen=True)
class Streaming(Compression):
    """Keeps the prompt's first tokens and its last ones, whatever they say.

    Positions stay those of the whole prompt, as in every method here; the paper numbers the kept
    tokens anew, for answers without end.

    Parameters
    ----------
    keep : float
        Share of the prompt's tokens that stay.
    sinks : int
        First tokens that always stay; 4 in the paper.
    """

    name: ClassVar[str] = "streaming"
    sinks: int = 4

    def score(
        self, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> torch.Tensor:
        scores = torch.arange(key.shape[2], dtype=torch.float32, device=key.device)
        scores[: self.sinks] = float("inf")
        return scores.expand(key.shape[1], -1)
