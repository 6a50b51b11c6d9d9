"""What a planned prompt is: segments of token ids, and the roles of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from a3_engine.conversations import Conversation
from a3_engine.layout import Layout, Span

Kind = Literal["prefix", "chunk", "head", "turn", "fresh"]


class Match(NamedTuple):
    """A known text at ``text[start:stop]``."""

    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """A run of the prompt that is either cached (the encode prefix, a chunk) or fresh.

    A head is a chunk's first tokens; see :meth:`~a3_engine.chunks.library.ChunkLibrary.head`.
    A turn is what a conversation said before, and a chunk where it is stored. Its ``owner`` is a
    part of its key; see :class:`~a3_engine.conversations.Conversation`. One that opens its prompt
    is computed after the very tokens before it, and is exact there.
    """

    kind: Kind
    ids: tuple[int, ...]
    text: str = ""
    tag: str | None = None
    owner: str = ""
    context: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """Segments in order; those from ``question_from`` on belong to the question where fresh.

    ``turns`` are what the ``conversation`` said, to be stored when the prompt is answered; the
    answer finishes the ``unanswered`` one.
    """

    segments: tuple[Segment, ...]
    question_from: int
    turns: tuple[Segment, ...] = ()
    unanswered: Segment | None = None
    conversation: Conversation | None = None

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole prompt, the same for every method."""
        return [token for segment in self.segments for token in segment.ids]

    @property
    def n_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def cached(self) -> list[tuple[int, Segment]]:
        """Cached segments with the positions of their first tokens."""
        starts, position = [], 0
        for segment in self.segments:
            starts.append((position, segment))
            position += len(segment.ids)
        return [(start, segment) for start, segment in starts if segment.kind != "fresh"]

    def layout(
        self, prefix_ids: tuple[int, ...], reused: int = 0, head: int | None = None
    ) -> Layout:
        """Positions by role. The last token is computed in any case: it chooses the answer's first.

        Parameters
        ----------
        prefix_ids : tuple of int
            The encode prefix: a chunk that stands just after it is exact.
        reused : int
            Tokens at the start that have no role, because an earlier turn computed them. What it
            leaves of a chunk that it cuts is fresh.
        head : int or None
            Only so many first tokens of that chunk are exact; all for None.
        """
        chunks: list[Span] = []
        fresh: list[torch.Tensor] = []
        question: list[torch.Tensor] = []
        position = 0
        so_far: list[int] = []
        last = self.n_tokens - 1
        for index, segment in enumerate(self.segments):
            stop = position + len(segment.ids)
            if segment.kind == "chunk" and position >= reused:
                end = min(stop, last)
                n_exact = end - position if head is None else min(head, end - position)
                context = prefix_ids if segment.context is None else segment.context
                exact = n_exact if tuple(so_far) == context else 0
                chunks.append(Span(position, end, exact))
                if end < stop:
                    fresh.append(torch.tensor([last]))
                    question.append(fresh[-1])
            elif segment.kind != "prefix" and stop > reused:
                fresh.append(torch.arange(max(position, reused), stop))
                if index >= self.question_from:
                    question.append(fresh[-1])
            so_far += segment.ids
            position = stop
        return Layout(
            n_tokens=position,
            chunks=tuple(chunks),
            prefix_tokens=chunks[0].start if chunks else position,
            fresh=torch.cat(fresh),
            question=torch.cat(question),
            reused=reused,
        )
