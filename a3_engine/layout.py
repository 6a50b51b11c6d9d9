"""Where the parts of one prompt stand: what selectors and the fusion pass need to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from a3_engine.devices import send
from a3_engine.processes import cached_property


@dataclass(frozen=True)
class Span:
    """A run of cached tokens: positions ``start`` to ``stop - 1``.

    The first ``exact`` of them have the keys and values of a full prefill, because everything
    before them is what they were computed after.
    """

    start: int
    stop: int
    exact: int = 0


@dataclass(frozen=True)
class Layout:
    """Positions by role. All tensors are sorted int64 positions, on one device.

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
    SENT: ClassVar = ("chunk_positions", "inexact_positions", "later_in_question")

    def on(self, device: torch.device) -> Layout:
        """The same on a device, sent there once and without waiting."""
        if self.fresh.device == device:
            return self
        moved = replace(self, fresh=send(self.fresh, device), question=send(self.question, device))
        for name in self.SENT:
            moved.__dict__[name] = send(getattr(self, name), device)
        moved.__dict__["question_start"] = self.question_start
        return moved

    @cached_property
    def chunk_positions(self) -> torch.Tensor:
        """Positions of all chunk tokens, the candidates for recomputation."""
        spans = [torch.arange(span.start, span.stop) for span in self.chunks]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    @cached_property
    def inexact_positions(self) -> torch.Tensor:
        """Those of them that context may have moved."""
        spans = [torch.arange(span.start + span.exact, span.stop) for span in self.chunks]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def with_chunk_tokens(self, kept: torch.Tensor) -> torch.Tensor:
        """Sorted positions of everything but the chunk tokens that are not among ``kept``.

        Where some are kept twice, only the CPU knows at once how many there are; elsewhere the
        result ends in as many positions of ``n_tokens``, which is beyond the prompt.
        """
        device = self.fresh.device
        stays = torch.ones(self.n_tokens, dtype=torch.bool, device=device)
        stays.index_fill_(0, self.chunk_positions, False).index_fill_(0, kept, True)
        if device.type == "cpu":
            return stays.nonzero()[:, 0]
        most = min(self.n_tokens, self.n_tokens - len(self.chunk_positions) + len(kept))
        everything = torch.arange(self.n_tokens, device=device)
        return everything.masked_fill(~stays, self.n_tokens).sort().values[:most]

    @cached_property
    def question_start(self) -> int:
        """Position of the question's first token."""
        return int(self.question[0])

    @cached_property
    def later_in_question(self) -> torch.Tensor:
        """Which tokens, from the question's first on, each of its tokens does not see.

        Shape ``(question, tokens from question_start on)``. They are those of the question alone:
        its words may also stand before the documents, and they see those all the same.
        """
        where = torch.arange(self.question_start, self.n_tokens)
        return torch.isin(where, self.question) & (where > self.question[:, None])

    @property
    def n_question(self) -> int:
        return len(self.question)
