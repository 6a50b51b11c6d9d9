"""Chunks in memory, compact ones decoded; pinned where a GPU copies from it, which is faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.store import StoreStats
from a3_engine.kv import ChunkKV


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
        self._payloads: BoundedLRU[str, Payload] = BoundedLRU(
            max_bytes=size_limit, nbytes=lambda payload: payload.nbytes
        )

    def get(self, expected: Header) -> Payload | None:
        payload = self._payloads.get(expected.key)
        return payload if payload is not None and payload.header == expected else None

    def put(self, payload: Payload, tag: str | None = None) -> int:
        if payload.nbytes > self.size_limit:
            return 0
        # A copy: what comes from the disk is a mapped file, which is not bounded by anything.
        kept = replace(payload, tensors={n: self._copy(t) for n, t in payload.tensors.items()})
        self._payloads.put(payload.header.key, kept)
        return kept.nbytes

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        if payload.decoded is None and kv.nbytes <= self.size_limit:
            kept = replace(payload, tensors={}, decoded=kv)
            self._payloads.put(payload.header.key, kept)

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        return set(keys) & self._payloads.keys()

    def touch(self, keys: Sequence[str]) -> None:
        pass  # reading did

    def retag(self, tags: Mapping[str, str]) -> None:
        pass

    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        self.discard(also)
        return set()

    def discard(self, keys: Iterable[str]) -> None:
        self._payloads.discard(keys)

    def stats(self) -> StoreStats:
        return StoreStats("memory", len(self._payloads), self._payloads.nbytes, self.size_limit)

    def verify(self, *, fix: bool = True) -> list[str]:
        return []

    def close(self) -> None:
        self._payloads.clear()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, pin_memory=self._pin).copy_(tensor)
