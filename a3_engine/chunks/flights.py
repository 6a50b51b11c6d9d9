"""Single flight: threads that want the same chunk at once get it made or fetched once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack

STRIPES = 64


class Flights:
    """One lock for each of some groups of keys."""

    def __init__(self) -> None:
        self._locks = [threading.Lock() for _ in range(STRIPES)]

    def of(self, keys: Iterable[str]) -> ExitStack:
        """Hold the locks of these keys until it is closed; who holds them first does the work."""
        with ExitStack() as held:
            # All threads take them in one order, so that no two wait for each other.
            for stripe in sorted({int(key[:8], 16) % STRIPES for key in keys}):
                held.enter_context(self._locks[stripe])
            return held.pop_all()
