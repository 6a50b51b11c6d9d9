"""Files of a local store that stay mapped between two requests.

To open a chunk's file, map it and touch its pages takes longer than to copy what is in it.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from a3_engine.chunks.payload import Header, Payload
from a3_engine.processes import Lock

MAX_FILES, MAX_BYTES = 512, 2**34  # the system takes their pages back when it wants them
REMOVES_MAPPED = os.name != "nt"

# (name, inode, size, change times): a file that was exchanged or changed has another.
Identity = tuple[str, int, int, int, int]


class Opened:
    """The payloads opened last, bounded by number and by bytes; safe to use from threads."""

    def __init__(self) -> None:
        self._payloads: OrderedDict[Identity, Payload] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def get(self, identity: Identity, expected: Header) -> Payload | None:
        """What was kept of this very file, if it is what is expected."""
        with self._lock:
            payload = self._payloads.get(identity)
            if payload is None or payload.header != expected:
                return None
            self._payloads.move_to_end(identity)
            return payload

    def keep(self, identity: Identity, payload: Payload) -> None:
        """Keep a mapped payload; where the system removes no mapped file, none is kept."""
        if not REMOVES_MAPPED:
            return
        with self._lock:
            self._drop(identity)
            self._payloads[identity] = payload
            self._nbytes += payload.nbytes
            while len(self._payloads) > MAX_FILES or self._nbytes > MAX_BYTES:
                self._drop(next(iter(self._payloads)))

    def forget(self, name: str) -> None:
        """Let go of a file that is being removed: its space is free only then."""
        with self._lock:
            for identity in [known for known in self._payloads if known[0] == name]:
                self._drop(identity)

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._payloads.clear()
            self._nbytes = 0

    def _drop(self, identity: Identity) -> None:
        payload = self._payloads.pop(identity, None)
        self._nbytes -= payload.nbytes if payload is not None else 0
