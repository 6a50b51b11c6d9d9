"""Several tiers as one store: read through the slow ones, write through all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from a3_engine.chunks.keyed_locks import KeyedLocks
from a3_engine.chunks.known import About
from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.store import ChunkStore, StoreStats
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.errors import StoreError
from a3_engine.kv import ChunkKV

logger = logging.getLogger(__name__)


class TieredStore:
    """Tiers, fastest first. What the store promises is what its local folder promises.

    Parameters
    ----------
    tiers : sequence of ChunkStore
        A chunk found in one is copied into those before it.
    local : DiskStore
        The one of them whose figures are reported and whose entries are verified.
    """

    def __init__(self, tiers: Sequence[ChunkStore], local: DiskStore) -> None:
        self._tiers, self.local = tiers, local
        # Two requests that both need a chunk from a slow tier meet here, and fetch it once.
        self._flights = KeyedLocks()

    def get(self, expected: Header) -> Payload | None:
        with self._flights.of(expected.key):
            for depth, tier in enumerate(self._tiers):
                payload = tier.get(expected)
                if payload is not None:
                    self._fill(self._tiers[:depth], payload)
                    return payload
        return None

    def put(self, payload: Payload, tag: str | None = None) -> int:
        written, failure = 0, None
        for tier in self._tiers:
            try:
                nbytes = tier.put(payload, tag)
            except StoreError as error:
                failure = error
            else:
                written = nbytes if tier is self.local else written
        if failure is not None:
            raise failure
        return written

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        for tier in self._tiers:
            tier.keep_decoded(payload, kv)

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        missing, found = set(keys), set()
        for tier in self._tiers:
            if missing:
                found |= tier.contains_many(missing)
                missing -= found
        return found

    def touch(self, keys: Sequence[str]) -> None:
        for tier in self._tiers:
            tier.touch(keys)

    def retag(self, tags: Mapping[str, str]) -> None:
        for tier in self._tiers:
            tier.retag(tags)

    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        keys = self.local.evict(tag, also)
        # The slowest first: each tier's tags decide about its own, and about untagged ones above.
        for tier in reversed(self._tiers):
            keys |= tier.evict(tag, keys)
        return keys

    def discard(self, keys: Iterable[str]) -> None:
        keys = set(keys)
        for tier in self._tiers:
            tier.discard(keys)

    def stats(self) -> StoreStats:
        return self.local.stats()

    def verify(self, *, fix: bool = True) -> list[str]:
        return self.local.verify(fix=fix)

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()

    def _fill(self, tiers: Sequence[ChunkStore], payload: Payload) -> None:
        for tier in reversed(tiers):
            try:
                tier.put(payload, About.from_json(payload.about).tag)
            except StoreError as error:
                logger.warning("%s The chunk stays where it was found.", error)
