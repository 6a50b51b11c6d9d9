"""How long a store may make its caller wait.

Ingestion waits for its turn. A request does not: all that it waits for one lock or one shared store
counts together, however many chunks it asks for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REQUEST_S = 1.0  # for a lock, in all of a request

_waited: ContextVar[dict[int, float] | None] = ContextVar("a3_waited", default=None)


@contextmanager
def one_request() -> Iterator[None]:
    """What is asked of stores inside belongs to one request."""
    token = _waited.set({})
    try:
        yield
    finally:
        _waited.reset(token)


@contextmanager
def waiting(on: object, most: float, of_a_request: float = REQUEST_S) -> Iterator[float]:
    """Yields the seconds that the caller may wait for something, and counts those that it does."""
    waited = _waited.get()
    if waited is None:
        yield most
        return
    started = time.monotonic()
    try:
        yield max(0.0, min(most, of_a_request - waited.get(id(on), 0.0)))
    finally:
        waited[id(on)] = waited.get(id(on), 0.0) + time.monotonic() - started
