"""What every worker does: load once, then answer requests, one JSON object a line.

A request is ``{"ids": [...], "chunks": [[start, stop], ...], "method": "..."}``: token ids of the
whole prompt, where the retrieved chunks stand in it, and a name that means something to the worker.
The answer has ``text``, that of the first token; ``ttft_s``, seconds from the request's arrival to
it; and ``reused_tokens``, those of the prompt that were not computed again, null where the peer
does not say.

It needs the standard library alone, since each peer has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The first token's text, the tokens reused, and when it was there, by ``perf_counter``."""

    text: str
    reused: int | None
    at: float = field(default_factory=time.perf_counter)


def serve(version: str, answer: Callable[[dict[str, Any]], Answer]) -> None:
    """Answer requests until the input ends. Call :func:`keep_stdout` before loading anything."""
    say({"version": version})
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        first = answer(request)
        say(
            {
                "text": first.text,
                "ttft_s": first.at - started,
                "reused_tokens": first.reused,
            }
        )


def keep_stdout() -> None:
    """Keep the standard output for answers; what libraries print goes to the standard error."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_answers, flush=True)


_answers = sys.stdout
