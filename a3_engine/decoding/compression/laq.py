"""Lookahead Q-Cache: what a draft of the answer attends to (arXiv 2505.20334)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from a3_engine.decoding.compression.base import Compressor, best, full_attention_only
from a3_engine.decoding.compression.lookahead import lookahead_queries
from a3_engine.decoding.compression.snapkv import SnapKV
from a3_engine.fusion.cache import FusedCache
from a3_engine.model.masks import RowMask


@dataclass(frozen=True)
class LAQ(SnapKV):
    """SnapKV's selection serves to draft a few tokens; their queries select from the full cache.

    The draft is thrown away and decoding begins again after the first token. Lookahead queries see
    the whole prompt: the authors' code (noforit/Lookahead_Q-Cache at 74612bd) hides the prompt's
    last tokens from some of them, which is left out here. Selection is by KV head, where theirs is
    by query head. The full cache lives until the second selection: peak memory is not saved.

    Parameters
    ----------
    keep, window, kernel, pooling
        Of both selections; see :class:`~a3_engine.decoding.compression.snapkv.SnapKV`. 7 and
        ``"max"`` as in the authors' code.
    lookahead : int
        Tokens to draft; 8 in the paper.
    prompt_rows : int
        Last rows of the prompt that join the queries and always stay: none for LAQ, 8 for LAQ++.
    """

    name: ClassVar[str] = "laq"
    kernel: int = 7
    pooling: Literal["avg", "max"] = "max"
    lookahead: int = 8
    prompt_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead < 1:
            raise ValueError(f"At least one token is drafted, not {self.lookahead}.")

    def start(self) -> Compressor:
        return LAQCompressor(self)


@dataclass(frozen=True)
class LAQPlusPlus(LAQ):
    """LAQ with the prompt's last rows among the queries."""

    name: ClassVar[str] = "laq++"
    prompt_rows: int = 8


class LAQCompressor(Compressor):
    """One request: remembers the prompt's last queries, drafts, and selects again."""

    method: LAQ

    def __init__(self, method: LAQ) -> None:
        super().__init__(method)
        self._last: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        super().observe(layer, query, key, rows, scaling)
        first = max(0, query.shape[2] - self.method.prompt_rows)
        visible = rows.keys_before(rows.positions[first:] + 1)
        self._last[layer] = (query[:, :, first:], visible, scaling)

    def _where(
        self, model: PreTrainedModel, cache: FusedCache, token: int
    ) -> list[torch.Tensor | None]:
        method = self.method
        draft_cache = cache.gathered(super()._where(model, cache, token), room=method.lookahead)
        drafted = lookahead_queries(model, draft_cache, token, method.lookahead)
        slots = {}
        for index, (layer, draft) in enumerate(zip(cache.layers, drafted, strict=True)):
            if draft is None:
                continue
            last, visible, scaling = self._last[index]
            query = torch.cat([last, draft], dim=2)
            sees_all = torch.full((draft.shape[2],), layer.n_prompt, device=visible.device)
            scores = method.rank(
                query, layer.stored()[0], torch.cat([visible, sees_all]), scaling, visible - 1
            )
            slots[index] = best(scores, method.budget(layer.n_prompt))
        return full_attention_only(cache, slots)
