"""Single flight: threads that want the same chunk at once get it made or fetched once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from a3_engine.processes import Lock


@dataclass
class _Flight:
    """A chunk's lock, and how many hold it or wait for it."""

    lock: Lock = field(default_factory=Lock)
    wanted: int = 0


class KeyedLocks:
    """One lock for each key, as long as anybody wants it."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}
        self._changing = Lock()

    def of(self, *keys: str) -> ExitStack:
        """Hold these keys until it is closed, in any thread; who holds them does the work."""
        with ExitStack() as held:
            # All threads take them in one order, so that no two wait for each other.
            for key in sorted(set(keys)):
                held.enter_context(self._one(key))
            return held.pop_all()

    @contextmanager
    def _one(self, key: str) -> Iterator[None]:
        with self._changing:
            flight = self._flights.setdefault(key, _Flight())
            flight.wanted += 1
        try:
            with flight.lock:
                yield
        finally:
            with self._changing:
                flight.wanted -= 1
                if not flight.wanted:
                    del self._flights[key]
