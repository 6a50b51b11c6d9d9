"""Redis or Valkey: a hash for each chunk with one field a layer group, a set for each tag.

A chunk's tags are a set too: it goes with its last one.

A chunk is one key of the server, so that its memory policy removes whole chunks; a value of a
layer group stays far below the 512 MB that a value may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from a3_engine.errors import StoreError

KEY = re.compile(rb"[0-9a-f]{64}")


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
            raise StoreError(f"The shared store cannot be opened: {error}") from error

    def read(self, key: str) -> list[bytes] | None:
        groups = self._redis.hgetall(f"a3:kv:{key}")
        names = [str(number).encode() for number in range(len(groups))]
        return [groups[name] for name in names] if groups and set(names) == set(groups) else None

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
