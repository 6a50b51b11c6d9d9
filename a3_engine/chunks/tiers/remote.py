"""Chunks in a store shared by many machines: a help that may be away, slow, or lying.

Every call has a deadline. A store that misses one, or fails, is left alone for a while; meanwhile
chunks are computed. What it returns is accepted like any foreign payload: see `payload.join`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from a3_engine.chunks.patience import waiting
from a3_engine.chunks.payload import MAX_HEADER, DamagedPayload, Header, Payload, join
from a3_engine.chunks.store import StoreStats
from a3_engine.chunks.urls import masked, unnamed
from a3_engine.kv import ChunkKV
from a3_engine.processes import make_anew_in_child

logger = logging.getLogger(__name__)

LEAVE_ALONE = 30.0  # seconds after a failure
CALLS = 8  # at once; a hanging one keeps its place until the other side or the system ends it
T = TypeVar("T")


class Blobs(Protocol):
    """What a kind of remote store has to offer. Anything may raise anything."""

    group_bytes: int  # how large one value may become

    def read(self, key: str, most: int) -> list[bytes] | None:
        """The layer groups of a chunk, in order; above ``most`` bytes by one at most."""

    def write(self, key: str, parts: list[bytes]) -> None:
        """Keep the layer groups of a chunk, replacing what was there."""

    def contains(self, keys: list[str]) -> set[str]:
        """Those of the keys that are stored."""

    def mark(self, tag: str, keys: Iterable[str]) -> None:
        """Remember that these chunks have this tag."""

    def take(self, tag: str, also: set[str]) -> set[str]:
        """Forget a tag; those of the keys that had it, and of others, that have no tag now."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these chunks where they are stored."""

    def close(self) -> None:
        """Let go of connections."""


class RemoteTier:
    """One shared store, behind deadlines.

    Parameters
    ----------
    timeout : float
        Seconds for one call, and for all calls of one request.
    """

    def __init__(self, blobs: Blobs, url: str, *, timeout: float, secret: bytes | None) -> None:
        self._blobs, self._secret_url, self._url = blobs, url, masked(url)
        self._timeout, self._secret = timeout, secret
        self._renew()
        make_anew_in_child(self._renew)
        self._away_until = 0.0

    def _renew(self) -> None:
        self._places = threading.Semaphore(CALLS)

    @classmethod
    def open(cls, url: str, *, timeout: float, secret: bytes | None) -> RemoteTier:
        """Choose by the URL's scheme: Redis's own, or any that fsspec knows.

        Raises
        ------
        StoreError
            The package for this scheme is not installed, or the URL is not one.
        """
        blobs: Blobs
        if url.startswith(("file://", "local://")):
            from a3_engine.chunks.tiers.folder import FolderBlobs

            blobs = FolderBlobs(url)
        elif url.partition("://")[0] in ("redis", "rediss", "unix", "valkey", "valkeys"):
            from a3_engine.chunks.tiers.redis import RedisBlobs

            blobs = RedisBlobs(url, timeout)
        else:
            from a3_engine.chunks.tiers.objects import ObjectBlobs

            blobs = ObjectBlobs(url)
        return cls(blobs, url, timeout=timeout, secret=secret)

    def get(self, expected: Header) -> Payload | None:
        # Each layer may be a document of its own.
        most = expected.nbytes[1] + expected.shape[0] * (MAX_HEADER + 8)
        parts = self._call(lambda: self._blobs.read(expected.key, most), None)
        if parts is None:
            return None
        try:
            return join(expected, parts, self._secret)
        except DamagedPayload as error:
            logger.warning(
                "Chunk %s at %s is not used: %s. It is computed and written again.",
                expected.key[:12],
                self._url,
                error,
            )
            return None

    def put(self, payload: Payload, tag: str | None = None) -> int:
        parts = [p.to_bytes(self._secret) for p in payload.split(self._blobs.group_bytes)]
        key = payload.header.key

        def write() -> int:
            self._blobs.write(key, parts)
            if tag is not None:
                self._blobs.mark(tag, [key])
            return sum(map(len, parts))

        return self._call(write, 0)

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        pass  # nothing is in memory here

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        wanted = list(keys)
        return self._call(lambda: self._blobs.contains(wanted), set())

    def touch(self, keys: Sequence[str]) -> None:
        pass

    def retag(self, tags: Mapping[str, str]) -> None:
        by_tag: dict[str, list[str]] = {}
        for key, tag in tags.items():
            by_tag.setdefault(tag, []).append(key)

        def mark() -> None:
            for tag, keys in by_tag.items():
                self._blobs.mark(tag, keys)

        if by_tag:
            self._call(mark, None)

    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        others = set(also)

        def evict() -> set[str]:
            keys = self._blobs.take(tag, others)
            self._blobs.delete(keys)
            return keys

        return self._call(evict, set())

    def discard(self, keys: Iterable[str]) -> None:
        if gone := list(keys):
            self._call(lambda: self._blobs.delete(gone), None)

    def stats(self) -> StoreStats:
        return StoreStats(self._url, 0, 0, 0)

    def verify(self, *, fix: bool = True) -> list[str]:
        return []

    def reachable(self) -> bool:
        """Whether the store answers now."""
        self._away_until = 0.0
        return self._call(lambda: self._blobs.contains(["0" * 64]) is not None, False)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._blobs.close()

    def _call(self, act: Callable[[], T], otherwise: T) -> T:
        """The result of a call, or ``otherwise`` where the store is away or has just been."""
        if time.monotonic() < self._away_until:
            return otherwise
        with waiting(self, self._timeout, of_a_request=self._timeout) as seconds:
            deadline = time.monotonic() + seconds
            if not self._places.acquire(timeout=seconds):
                return otherwise
            try:
                # A thread of its own: no client's time-outs cover a peer that sends one byte a
                # second.
                return self._begun(act).result(max(0.0, deadline - time.monotonic()))
            except Exception as error:
                self._away_until = time.monotonic() + LEAVE_ALONE
                why = unnamed(error, self._secret_url)
                logger.warning(
                    "The shared store at %s is away (%s); chunks are computed, and it is asked "
                    "again in %g seconds.",
                    self._url,
                    why or f"no answer within {self._timeout:g} seconds",
                    LEAVE_ALONE,
                )
                return otherwise

    def _begun(self, act: Callable[[], T]) -> Future[T]:
        result: Future[T] = Future()
        places = self._places

        def run() -> None:
            try:
                result.set_result(act())
            except Exception as error:
                result.set_exception(error)
            finally:
                places.release()

        threading.Thread(target=run, name="a3-remote", daemon=True).start()
        return result
