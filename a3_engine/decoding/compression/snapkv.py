"""SnapKV: what the end of the prompt attends to (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from a3_engine.decoding.compression.base import Compression, attention_weights
from a3_engine.model.masks import RowMask


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
        self, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> torch.Tensor:
        visible = rows.keys_before(rows.positions[-self.window :] + 1)
        last = query[:, :, -len(visible) :]
        return self.rank(last, key, visible, scaling, stays=visible - 1)

    def rank(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        visible: torch.Tensor,
        scaling: float,
        stays: torch.Tensor,
    ) -> torch.Tensor:
        """Pooled attention of some queries; slots that stay in any case are infinite.

        Parameters
        ----------
        visible : torch.Tensor
            How many of the first keys each query sees.
        stays : torch.Tensor
            Slots whose own scores, as in the paper, are not pooled into their neighbours'.

        Returns
        -------
        torch.Tensor
            fp32, ``(kv_heads, tokens)``.
        """
        total = attention_weights(query, key, visible, scaling).sum(dim=2).mean(dim=1)
        stays = stays.to(total.device)
        total[:, stays] = 0.0
        pooled = avg_pool1d if self.pooling == "avg" else max_pool1d
        scores = pooled(total[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        scores[:, stays] = float("inf")
        return scores
