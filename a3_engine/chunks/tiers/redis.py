"""Redis or Valkey: a hash for each chunk with one field a layer group, a set for each tag.

A chunk's tags are a set too: it goes with its last one.

A chunk is one key of the server, so that its memory policy removes whole chunks; a value of a
layer group stays far below the 512 MB that a value may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from a3_engine.chunks.urls import unnamed
from a3_engine.errors import StoreError

KEY = re.compile(rb"[0-9a-f]{64}")
MAX_GROUPS = 4096  # one a layer at most
MOST_BESIDE = 2**20  # bytes of an answer beside a chunk's
MOST_TAGGED = 2**26  # of a tag's keys

_most: ContextVar[int] = ContextVar("a3_redis_most", default=MOST_BESIDE)


class Bounded:
    """A socket that reads no more than an answer can have, whatever length the server claims."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._left = inner, MOST_BESIDE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sendall(self, *arguments: Any) -> None:
        self._left = _most.get()
        self._inner.sendall(*arguments)

    def recv(self, *arguments: Any) -> bytes:
        received: bytes = self._inner.recv(*arguments)
        self._count(len(received))
        return received

    def recv_into(self, *arguments: Any) -> int:
        received: int = self._inner.recv_into(*arguments)
        self._count(received)
        return received

    def _count(self, received: int) -> None:
        self._left -= received
        if self._left < 0:
            raise ValueError("it sends more than any answer can have")


def _bounded(connection: type) -> type:
    """The same kind of connection with such a socket."""

    def connect(self: Any) -> Bounded:
        return Bounded(connection._connect(self))  # type: ignore[attr-defined]

    return type("Bounded", (connection,), {"_connect": connect})


class RedisBlobs:
    """``a3:kv:KEY`` (a hash), ``a3:tag:TAG`` and ``a3:tags:KEY`` (sets)."""

    group_bytes = 8 * 2**20

    def __init__(self, url: str, timeout: float) -> None:
        try:
            import redis
        except ImportError as error:
            raise StoreError(
                "A shared store on Redis needs its client: pip install 'a3-integrations[redis]'."
            ) from error
        url = re.sub("^valkey", "redis", url)
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        except ValueError as error:
            raise StoreError(f"The shared store cannot be opened: {unnamed(error, url)}") from error
        pool = self._redis.connection_pool
        pool.connection_class = _bounded(pool.connection_class)

    def read(self, key: str, most: int) -> list[bytes] | None:
        name = f"a3:kv:{key}"
        n_groups = self._redis.hlen(name)
        if not 0 < n_groups <= MAX_GROUPS:
            return None
        groups = [str(number) for number in range(n_groups)]
        with self._redis.pipeline(transaction=False) as pipeline:
            for group in groups:
                pipeline.hstrlen(name, group)
            if sum(pipeline.execute()) > most:
                raise ValueError(f"chunk {key[:12]} is larger than any such chunk")
        _most.set(most + MOST_BESIDE)  # of this call's own thread
        found: list[bytes | None] = self._redis.hmget(name, groups)
        return None if None in found else [group for group in found if group is not None]

    def write(self, key: str, parts: list[bytes]) -> None:
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(f"a3:kv:{key}")
            for number, part in enumerate(parts):
                pipeline.hset(f"a3:kv:{key}", str(number), part)
            pipeline.execute()

    def contains(self, keys: list[str]) -> set[str]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(f"a3:kv:{key}")
            return {key for key, there in zip(keys, pipeline.execute(), strict=True) if there}

    def mark(self, tag: str, keys: Iterable[str]) -> None:
        with self._redis.pipeline(transaction=True) as pipeline:
            for key in keys:
                pipeline.sadd(f"a3:tag:{tag}", key)
                pipeline.sadd(f"a3:tags:{key}", tag)
            pipeline.execute()

    def take(self, tag: str, also: set[str]) -> set[str]:
        _most.set(MOST_TAGGED)
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.smembers(f"a3:tag:{tag}")
            pipeline.delete(f"a3:tag:{tag}")
            members, _ = pipeline.execute()
        keys = also | {member.decode() for member in members if KEY.fullmatch(member)}
        with self._redis.pipeline(transaction=True) as pipeline:
            for key in keys:
                pipeline.srem(f"a3:tags:{key}", tag)
                pipeline.exists(f"a3:tags:{key}")  # an empty set is none
            others = pipeline.execute()[1::2]
        return {key for key, other in zip(keys, others, strict=True) if not other}

    def delete(self, keys: Iterable[str]) -> None:
        if names := [f"a3:kv:{key}" for key in keys]:
            self._redis.unlink(*names)

    def close(self) -> None:
        self._redis.close()
