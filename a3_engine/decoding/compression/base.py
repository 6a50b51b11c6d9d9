"""What a compression is: a frozen dataclass that says which tokens stay in the cache for decoding.

The prompt is read in full: the fusion pass, and with it the first token, are those of the selector.
Behind the first token every layer keeps a share of its slots, each KV head its own ones. Layers
with a sliding window are left alone.

A score comes from the queries of the rows that the fusion pass computes. Reused tokens have none:
what full prefill would add up over all tokens is added up over the recomputed and the fresh ones.
Those that attend to less than everything in a long prompt count as if they attended to all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from a3_engine.fusion.cache import FusedCache
from a3_engine.model.masks import RowMask

BLOCK_ROWS = 128  # attention weights are fp32: 128 rows over 8k tokens and 32 heads take 134 MB


@dataclass(frozen=True)
class Compression(ABC):
    """Base of all compression methods.

    Parameters
    ----------
    keep : float
        Share of the prompt's tokens that stay, above 0 and up to 1.
    """

    name: ClassVar[str]
    keep: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"The share to keep lies above 0 and up to 1, not at {self.keep}.")

    def budget(self, n_tokens: int) -> int:
        """Number of tokens that stay."""
        return max(1, int(n_tokens * self.keep))

    @abstractmethod
    def score(
        self, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> torch.Tensor:
        """How much one layer needs each token; the highest scores stay, infinite ones first.

        Parameters
        ----------
        query : torch.Tensor
            Of the rows that the pass computed, ``(1, heads, rows, head_dim)``, rotated.
        key : torch.Tensor
            Of all tokens, ``(1, kv_heads, tokens, head_dim)``, rotated.
        rows : RowMask
            Where they stand.

        Returns
        -------
        torch.Tensor
            fp32, ``(kv_heads, tokens)``.
        """

    def start(self) -> Compressor:
        """A new request's compressor."""
        return Compressor(self)


class Compressor:
    """One request: looks on during the fusion pass, then cuts the cache.

    Parameters
    ----------
    method : Compression
    """

    def __init__(self, method: Compression) -> None:
        self.method = method
        self._slots: dict[int, torch.Tensor] = {}

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        """Take in one layer of the fusion pass."""
        scores = self.method.score(query, key, rows, scaling)
        self._slots[layer] = best(scores, self.method.budget(key.shape[2]))

    def compress(self, model: PreTrainedModel, cache: FusedCache, token: int) -> None:
        """Cut the completed cache; ``token`` is the answer's first."""
        cache.retain(self._where(model, cache, token))

    def _where(
        self, model: PreTrainedModel, cache: FusedCache, token: int
    ) -> list[torch.Tensor | None]:
        return full_attention_only(cache, self._slots)


def full_attention_only(
    cache: FusedCache, slots: dict[int, torch.Tensor]
) -> list[torch.Tensor | None]:
    """The slots to keep by layer; None, for all, where one has a sliding window or no keys."""
    return [
        slots[index] if layer.shape.attends and not layer.is_sliding else None
        for index, layer in enumerate(cache.layers)
    ]


def best(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Sorted slots of the highest scores, ``(kv_heads, budget)``; equal scores: the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :budget].sort(dim=-1).values


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax weights of rows over all keys, fp32, ``(kv_heads, group, rows, tokens)``.

    Parameters
    ----------
    query, key : torch.Tensor
        ``(1, heads, rows, head_dim)`` and ``(1, kv_heads, tokens, head_dim)``.
    visible : torch.Tensor
        How many of the first keys each row sees, ``(rows,)``.
    """
    _, heads, n_rows, head_dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    grouped = (query * scaling).reshape(kv_heads, heads // kv_heads * n_rows, head_dim)
    scores = torch.matmul(grouped, key[0].transpose(1, 2)).view(kv_heads, -1, n_rows, n_keys)
    hidden = torch.arange(n_keys, device=key.device) >= visible.to(key.device)[:, None]
    return torch.softmax(scores.float().masked_fill_(hidden, float("-inf")), dim=-1)
