"""Files of a local store that stay mapped between two requests.

To open a chunk's file, map it and touch its pages takes longer than to copy what is in it.
"""

from __future__ import annotations

import os

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.chunks.payload import Payload

MAX_FILES, MAX_BYTES = 512, 2**34  # the system takes their pages back when it wants them
REMOVES_MAPPED = os.name != "nt"

# (name, inode, size, change times): a file that was exchanged or changed has another.
Identity = tuple[str, int, int, int, int]


class Opened(BoundedLRU[Identity, Payload]):
    """The payloads opened last, bounded by number and by bytes; safe to use from threads."""

    def __init__(self) -> None:
        super().__init__(MAX_FILES, MAX_BYTES, lambda payload: payload.nbytes)

    def put(self, key: Identity, value: Payload) -> None:
        """Keep a mapped payload; where the system removes no mapped file, none is kept."""
        if REMOVES_MAPPED:
            super().put(key, value)

    def forget(self, name: str) -> None:
        """Let go of a file that is being removed: its space is free only then."""
        self.discard(identity for identity in self.keys() if identity[0] == name)
