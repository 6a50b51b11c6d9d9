"""Single flight: threads that want the same chunk at once get it made or fetched once."""

from __future__ import annotations

import threading

STRIPES = 64


class Flights:
    """One lock for each of some groups of keys."""

    def __init__(self) -> None:
        self._locks = [threading.Lock() for _ in range(STRIPES)]

    def of(self, key: str) -> threading.Lock:
        """The lock of a key; the first thread to hold it does the work."""
        return self._locks[int(key[:8], 16) % STRIPES]
