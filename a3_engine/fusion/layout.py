"""Where the parts of one prompt stand: what selectors and the fusion pass need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """A run of cached tokens: positions ``start`` to ``stop - 1``.

    The first ``exact`` of them have the keys and values of a full prefill, because everything
    before them is what they were computed behind.
    """

    start: int
    stop: int
    exact: int = 0


@dataclass(frozen=True)
class Layout:
    """Positions by role. All tensors are sorted int64 positions on the CPU.

    Parameters
    ----------
    n_tokens : int
        Length of the prompt.
    chunks : tuple of Span
        The cached chunks in prompt order, the encode prefix excluded.
    prefix_tokens : int
        Tokens before the first chunk.
    fresh : torch.Tensor
        Tokens without a cached counterpart; they are computed in any case.
    question : torch.Tensor
        The fresh tokens whose attention selects; never empty.
    reused : int
        Tokens at the start whose keys and values an earlier turn left in the cache. They are
        neither chunk nor fresh.
    """

    n_tokens: int
    chunks: tuple[Span, ...]
    prefix_tokens: int
    fresh: torch.Tensor
    question: torch.Tensor
    reused: int = 0

    @property
    def chunk_positions(self) -> torch.Tensor:
        """Positions of all chunk tokens, the candidates for recomputation."""
        spans = [torch.arange(span.start, span.stop) for span in self.chunks]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    @property
    def inexact_positions(self) -> torch.Tensor:
        """Those of them that context may have moved."""
        spans = [torch.arange(span.start + span.exact, span.stop) for span in self.chunks]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def with_chunk_tokens(self, kept: torch.Tensor) -> torch.Tensor:
        """Sorted positions of everything but the chunk tokens that are not among ``kept``."""
        stays = torch.ones(self.n_tokens, dtype=torch.bool)
        stays[self.chunk_positions] = False
        stays[kept] = True
        return stays.nonzero()[:, 0]

    @property
    def n_question(self) -> int:
        return len(self.question)
