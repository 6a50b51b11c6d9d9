"""Chunks in memory, compact ones decoded; pinned where a GPU copies from it, which is faster."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.store import StoreStats
from a3_engine.kv import ChunkKV
from a3_engine.processes import Lock


class MemoryTier:
    """The most recently used chunks, up to a number of bytes.

    Tags are left to the other tiers; what they evict goes here too.

    Parameters
    ----------
    size_limit : int
        Bytes.
    pin : bool
        Whether to lock the memory, so that a GPU copies from it by itself.
    """

    def __init__(self, size_limit: int, *, pin: bool = False) -> None:
        self.size_limit = size_limit
        self._pin = pin
        self._lock = Lock()
        self._payloads: OrderedDict[str, Payload] = OrderedDict()
        self._nbytes = 0

    def get(self, expected: Header) -> Payload | None:
        with self._lock:
            payload = self._payloads.get(expected.key)
            if payload is None or payload.header != expected:
                return None
            self._payloads.move_to_end(expected.key)
            return payload

    def put(self, payload: Payload, tag: str | None = None) -> int:
        if payload.nbytes > self.size_limit:
            return 0
        # A copy: what comes from the disk is a mapped file, which is not bounded by anything.
        kept = replace(payload, tensors={n: self._copy(t) for n, t in payload.tensors.items()})
        self._keep(kept)
        return kept.nbytes

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        if payload.decoded is None and kv.nbytes <= self.size_limit:
            self._keep(replace(payload, tensors={}, decoded=kv))

    def _keep(self, payload: Payload) -> None:
        with self._lock:
            self._remove(payload.header.key)
            self._payloads[payload.header.key] = payload
            self._nbytes += payload.nbytes
            while self._nbytes > self.size_limit:
                self._remove(next(iter(self._payloads)))

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        with self._lock:
            return set(keys) & self._payloads.keys()

    def touch(self, keys: Sequence[str]) -> None:
        pass  # reading did

    def retag(self, tags: Mapping[str, str]) -> None:
        pass

    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        self.discard(also)
        return set()

    def discard(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._remove(key)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats("memory", len(self._payloads), self._nbytes, self.size_limit)

    def verify(self, *, fix: bool = True) -> list[str]:
        return []

    def close(self) -> None:
        with self._lock:
            self._payloads.clear()
            self._nbytes = 0

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, pin_memory=self._pin).copy_(tensor)

    def _remove(self, key: str) -> None:
        if (payload := self._payloads.pop(key, None)) is not None:
            self._nbytes -= payload.nbytes
