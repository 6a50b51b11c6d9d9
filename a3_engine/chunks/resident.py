"""The chunks used last, decoded, in the memory of the device that computes.

What many questions retrieve need not come over the bus each time. Memory that the model or a
request wants goes first: the engine empties this when an allocation fails.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

from a3_engine.kv import ChunkKV
from a3_engine.processes import Lock

SHARE_OF_FREE = 1 / 4  # of the device's memory beside the model


class Resident:
    """Chunks on a device, the most recently used up to a number of bytes; safe from threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._chunks: OrderedDict[str, ChunkKV] = OrderedDict()
        self._nbytes = 0

    @classmethod
    def on(cls, device: torch.device) -> Resident:
        """One with a share of what is free on a GPU now; on a CPU, where memory is one, of none."""
        if device.type != "cuda":
            return cls(0)
        return cls(int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE))

    def get(self, key: str) -> ChunkKV | None:
        with self._lock:
            if (kv := self._chunks.get(key)) is not None:
                self._chunks.move_to_end(key)
            return kv

    def put(self, key: str, kv: ChunkKV) -> None:
        """Keep a chunk that has arrived whole; nobody may write into it from now on."""
        with self._lock:
            self._remove(key)
            if kv.nbytes > self.max_bytes:
                return
            self._chunks[key] = kv
            self._nbytes += kv.nbytes
            while self._nbytes > self.max_bytes:
                self._remove(next(iter(self._chunks)))

    def discard(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._remove(key)

    def clear(self) -> None:
        with self._lock:
            self._chunks.clear()
            self._nbytes = 0

    def _remove(self, key: str) -> None:
        if (kv := self._chunks.pop(key, None)) is not None:
            self._nbytes -= kv.nbytes
