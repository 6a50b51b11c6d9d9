"""SnapKV: what the end of the prompt attends to (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from a3_engine.decoding.compression.base import Compression, attention_weights
from a3_engine.model.attention import Rows


@dataclass(frozen=True)
class SnapKV(Compression):
    """Attention of the prompt's last computed rows, pooled over neighbours; those rows stay too.

    The paper's window is the prompt's end; after fusion the rows that were computed last are the
    question, and then recomputed tokens of the chunks.

    Parameters
    ----------
    keep : float
        Share of the prompt's tokens that stay.
    window : int
        Rows whose attention is added up; 32 as in the authors' code.
    kernel : int
        Width of the pooling, odd; 1 switches it off. 5 in the authors' code.
    pooling : str
        ``"avg"`` or ``"max"``.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"The window has at least one row, not {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"The pooling width is odd and positive, not {self.kernel}.")

    def score(
        self, query: torch.Tensor, key: torch.Tensor, rows: Rows, scaling: float
    ) -> torch.Tensor:
        positions = rows.positions[-self.window :]
        visible = rows.keys_before(positions + 1)
        weights = attention_weights(query[:, :, -len(positions) :], key, visible, scaling)
        total = weights.sum(dim=2).mean(dim=1)
        inside = (visible - 1).to(total.device)
        total[:, inside] = 0.0  # as in the paper, what the window says of itself is not pooled
        pooled = pool(total, self.kernel, self.pooling)
        pooled[:, inside] = float("inf")
        return pooled


def pool(scores: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Pool ``(kv_heads, tokens)`` over neighbouring tokens; the length stays."""
    pooled = avg_pool1d if pooling == "avg" else max_pool1d
    return pooled(scores[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
