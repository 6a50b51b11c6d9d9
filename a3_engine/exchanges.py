"""What of a prompt is a finished exchange: a user's message and all that answered it.

An exchange is one segment, with the template's words ahead of each of its messages: what answers is
computed after what was asked, and few tokens are left to be computed anew. Documents inside it
stay chunks of their own, and cut it. So does a system message, which changes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from a3_engine.conversations import Conversation
from a3_engine.messages import Message
from a3_engine.segments import Segment

LEAST_TOKENS = 16  # shorter ones are computed anew: they cost little
APART = ("user", "system")


class Divided(NamedTuple):
    """A prompt's segments, finished exchanges among them, and what the answer finishes.

    ``unanswered`` is the run that the answer's tokens go on with; None where it has none.
    """

    segments: list[Segment]
    turns: tuple[Segment, ...]
    unanswered: Segment | None


def divide(
    segments: Sequence[Segment],
    places: Sequence[int],
    messages: Sequence[Message],
    whose: Conversation,
    asked: int,
    opening: tuple[int, ...] | None,
) -> Divided:
    """Join the fresh segments of finished exchanges.

    Parameters
    ----------
    places : sequence of int
        The message that each segment belongs to; template text belongs to the one that it stands
        ahead of, and the last to the answer.
    asked : int
        The message that asks: exchanges before it are finished.
    opening : tuple of int or None
        Ids of the template text that begins the prompt, if some does.
    """
    divided: list[Segment] = []
    turns: list[Segment] = []
    unanswered = None
    alone = not any(place == asked and s.kind == "chunk" for s, place in _zip(segments, places))
    for run in _runs(segments, places, messages):
        last, parts = places[run[-1]], [segments[at] for at in run]
        ids = tuple(token for part in parts for token in part.ids)
        turn = Segment(
            "turn",
            ids,
            tag=whose.tag,
            owner=whose.owners[min(last, len(messages) - 1)],
            context=opening if run[0] == 1 else None,
        )
        if run[0] == 0 or parts[0].kind != "fresh" or len(ids) < LEAST_TOKENS:
            divided += parts
        elif last < asked:
            divided.append(turn)
        else:
            divided += parts
            if alone and last < len(messages):
                turns.append(turn)
        if alone and last == len(messages) and run[0] > 0:
            unanswered = turn
    turns = [each for each in divided if each.kind == "turn"] + turns
    return Divided(divided, tuple(replace(each, kind="chunk") for each in turns), unanswered)


def finished(unanswered: Segment, answer: Sequence[int], owner: str) -> Segment:
    """The exchange's last run with its answer, as the prompts to come show it."""
    return replace(unanswered, kind="chunk", ids=unanswered.ids + tuple(answer), owner=owner)


def _runs(
    segments: Sequence[Segment], places: Sequence[int], messages: Sequence[Message]
) -> Iterator[list[int]]:
    """Numbers of neighbouring fresh segments of one exchange; every other segment alone."""
    roles = [*(message.role for message in messages), "assistant"]
    run: list[int] = []
    for at, (segment, place) in enumerate(_zip(segments, places)):
        if run:
            before = places[run[-1]]
            other = place != before and (roles[place] in APART or roles[before] == "system")
            fresh = segment.kind == segments[run[-1]].kind == "fresh"
            if other or not fresh or run[0] == 0:
                yield run
                run = []
        run.append(at)
    if run:
        yield run


def _zip(segments: Sequence[Segment], places: Sequence[int]) -> Iterator[tuple[Segment, int]]:
    return zip(segments, places, strict=True)
