"""Memory that one prompt's cache leaves to the next one's.

A cache of a long prompt takes hundreds of megabytes. Memory that was given back to the system comes
page by page when it is asked for again, which takes longer than filling it: the more so on a
virtual machine, whose host has taken the pages.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch

from a3_engine.processes import Lock

KEPT_BYTES = 2**29
ALIGNMENT = 64  # bytes, as torch aligns its own


class Buffers:
    """Blocks of CPU memory that are kept for reuse when the last tensor in them is gone.

    Parameters
    ----------
    limit : int
        Bytes kept at most while nobody uses them.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._free: dict[int, list[np.ndarray]] = {}  # by bytes
        self._lock = Lock()
        # A block may come back in the middle of anything, also of what holds the lock.
        self._returned: deque[np.ndarray] = deque()

    def take(self, n_values: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory, a flat tensor; it comes back by itself."""
        nbytes = n_values * dtype.itemsize
        with self._lock:
            self._settle()
            # A much larger one would be held back by what is small.
            fitting = [size for size in self._free if nbytes <= size <= 2 * nbytes]
            block = self._remove(min(fitting)) if fitting else _aligned(nbytes)
        lent = block[:nbytes]
        # The tensor's storage holds on to `lent`, and so does every view of it.
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype)

    def clear(self) -> None:
        """Give the system what nobody uses."""
        with self._lock:
            self._returned.clear()
            self._free.clear()

    def _give_back(self, block: np.ndarray) -> None:
        if block.nbytes > self._limit:
            return
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Sort in what came back; with the lock."""
        while self._returned:
            block = self._returned.popleft()
            self._free.setdefault(block.nbytes, []).append(block)
            while self._kept > self._limit:
                self._remove(next(iter(self._free)))

    @property
    def _kept(self) -> int:
        """Bytes; a cache's blocks have one size, so there are few."""
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def _remove(self, size: int) -> np.ndarray:
        block = self._free[size].pop()
        if not self._free[size]:
            del self._free[size]
        return block


def _aligned(nbytes: int) -> np.ndarray:
    wider = np.empty(nbytes + ALIGNMENT, np.uint8)
    at = -wider.ctypes.data % ALIGNMENT
    return wider[at : at + nbytes]
