"""The contract of every chunk store, and how an engine's is put together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.urls import masked
from a3_engine.kv import ChunkKV

SECRET_VARIABLE = "A3_STORE_SECRET"


@dataclass(frozen=True)
class StoreStats:
    """What a store holds. ``nbytes`` and ``size_limit`` are bytes."""

    directory: str
    entries: int
    nbytes: int
    size_limit: int


class ChunkStore(Protocol):
    """Where computed chunks are kept. Safe for many threads and processes."""

    def get(self, expected: Header) -> Payload | None:
        """The chunk, or None; a damaged or foreign entry is removed and is a miss."""

    def put(self, payload: Payload, tag: str | None = None) -> int:
        """Keep a chunk; a local folder has it durably on return. Returns the bytes written.

        Raises
        ------
        StoreError
            It cannot be written.
        """

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        """Have a chunk decoded next time, where that is in memory."""

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are stored."""

    def touch(self, keys: Sequence[str]) -> None:
        """Count stored chunks as used last, where reading them has not done so."""

    def retag(self, tags: Mapping[str, str]) -> None:
        """Give chunks, by key, these tags beside those that they have."""

    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        """Take this tag from all chunks; those without another one go, and their keys are returned.

        So do chunks that ``also`` names, where they have no tag.
        """

    def discard(self, keys: Iterable[str]) -> None:
        """Remove these chunks where they are stored."""

    def stats(self) -> StoreStats:
        """Entries, bytes and limit."""

    def verify(self, *, fix: bool = True) -> list[str]:
        """Read everything and say what is damaged; remove it unless ``fix`` is False."""

    def close(self) -> None:
        """Release file handles and connections."""


def _secret() -> bytes | None:
    found = os.environ.get(SECRET_VARIABLE)
    return None if found is None else found.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class StoreOptions:
    """What stands around an engine's local folder.

    Parameters
    ----------
    url : str or None
        A store shared with other machines: ``redis://`` or any URL that fsspec opens, such as
        ``s3://bucket/folder``. Read when the folder has not got a chunk, written with it.
    memory_limit : int
        Bytes of chunks kept in memory, pinned where there is CUDA. 0 leaves that to the operating
        system's file cache.
    timeout : float
        Seconds that the shared store may take for one chunk; after that the chunk is computed, and
        the shared store is left alone for a while.
    secret : bytes or None
        Only chunks written by holders of the same secret are used. From the environment variable
        ``A3_STORE_SECRET`` where not given.
    """

    url: str | None = None
    memory_limit: int = 0
    timeout: float = 5.0
    secret: bytes | None = field(default_factory=_secret, repr=False)

    def __post_init__(self) -> None:
        if self.memory_limit < 0 or self.timeout <= 0:
            raise ValueError("memory_limit must be at least 0 bytes and timeout above 0 seconds.")
        if self.secret is not None and len(self.secret.strip()) < 16:
            raise ValueError(
                "The store's secret must have at least 16 bytes beside blanks. Set "
                f"{SECRET_VARIABLE} to one, or leave it unset: empty is not the same."
            )

    def __repr__(self) -> str:
        url = None if self.url is None else masked(self.url)
        return (
            f"StoreOptions(url={url!r}, memory_limit={self.memory_limit}, timeout={self.timeout})"
        )
