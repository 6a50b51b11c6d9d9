"""H2O: heavy hitters and the most recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.decoding.compression.base import BLOCK_ROWS, Compression, attention_weights
from a3_engine.model.masks import RowMask


@dataclass(frozen=True)
class H2O(Compression):
    """Attention added up over all computed rows; part of the budget goes to the last tokens.

    The selection happens once, after the prompt. The paper also goes on evicting while decoding.

    Parameters
    ----------
    keep : float
        Share of the prompt's tokens that stay.
    recent : float
        Share of these that are the prompt's last tokens; half as in the paper.
    """

    name: ClassVar[str] = "h2o"
    recent: float = 0.5

    def score(
        self, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> torch.Tensor:
        visible = rows.keys_before(rows.positions + 1)
        total = torch.zeros(key.shape[1:3], device=key.device)
        for start in range(0, len(visible), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            weights = attention_weights(query[:, :, block], key, visible[block], scaling)
            total += weights.sum(dim=2).mean(dim=1)
        n_recent = int(self.budget(key.shape[2]) * self.recent)
        total[:, key.shape[2] - n_recent :] = float("inf")
        return total
