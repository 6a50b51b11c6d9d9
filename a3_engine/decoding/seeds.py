"""Seeds of requests: each has random numbers of its own, whatever others draw beside it.

Threads that drew from one generator would get numbers by the order in which they come. A request's
seed is made of torch's state, of what it asks, and of how often that was asked since: so a program
that sets torch's seed gets the same answers again, also to requests at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from a3_engine.processes import Lock


class Seeds:
    """The seeds of one engine's requests."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._state: bytes | None = None
        self._base = 0
        self._asked: dict[bytes, int] = {}

    def next(self, ids: Sequence[int]) -> int:
        """The seed of a request for a prompt."""
        prompt = hashlib.sha256(repr(list(ids)).encode()).digest()
        with self._lock:
            state = _state()
            if state != self._state:  # somebody has set torch's seed, or drawn from it
                self._base, self._asked = int(torch.randint(2**62, ())), {}
                self._state = _state()
            number = self._asked[prompt] = self._asked.get(prompt, -1) + 1
            base = self._base
        text = f"{base} {prompt.hex()} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()
