"""The chunk store: computed KV on disk, found by key.

diskcache keeps the index, the sizes and the least-recently-used eviction. It pickles by default,
which would let whoever can write the folder run code (CVE-2025-69872); `SafeDisk` takes only str
keys and bytes, reads only files whose names it made, and never unpickles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import diskcache
from diskcache.core import MODE_BINARY

from a3_engine.chunks.codec import ChunkKV, DamagedPayload, Header, decode, encode, read_header
from a3_engine.errors import StoreError

logger = logging.getLogger(__name__)

DEFAULT_SIZE_LIMIT = 20 * 2**30
ATTEMPTS = 10
FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")


class UnsafeEntry(Exception):
    """An index row that this store cannot have written."""


class SafeDisk(diskcache.Disk):
    """Str keys, raw bytes, files of our own naming; everything else is refused."""

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"Chunk keys are str, not {type(key).__name__}.")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str):
            raise UnsafeEntry("a key that is not a plain str")
        return key

    def store(
        self, value: Any, read: bool, key: Any = diskcache.UNKNOWN
    ) -> tuple[int, int, str | None, Any]:
        if not isinstance(value, bytes):
            raise TypeError(f"Payloads are bytes, not {type(value).__name__}.")
        name, path = self.filename(key, value)
        name = name.replace(os.sep, "/")
        for attempt in range(ATTEMPTS):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            try:
                file = open(path, "xb")  # noqa: SIM115
                break
            except FileNotFoundError:  # another process has just removed the empty folder
                if attempt == ATTEMPTS - 1:
                    raise
        with file:
            file.write(value)
            file.flush()
            # The index row that follows reports the chunk as stored: the bytes come first.
            os.fsync(file.fileno())
        return len(value), MODE_BINARY, name, None

    def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
        if mode != MODE_BINARY or value is not None:
            raise UnsafeEntry("an entry that is not a file of bytes")
        path = self._path(filename)
        return open(path, "rb") if read else path.read_bytes()

    def remove(self, file_path: str) -> None:
        with contextlib.suppress(UnsafeEntry):
            self._path(file_path)
            super().remove(file_path)

    def _path(self, filename: Any) -> Path:
        if not isinstance(filename, str) or not FILE_NAME.fullmatch(filename.replace(os.sep, "/")):
            raise UnsafeEntry("a file name outside the store")
        path = Path(self._directory, filename)
        if path.is_symlink() or not path.resolve().is_relative_to(Path(self._directory).resolve()):
            raise UnsafeEntry("a file name that leads outside the store")
        return path


@dataclass(frozen=True)
class StoreStats:
    """What a store holds. ``nbytes`` and ``size_limit`` are bytes."""

    directory: str
    entries: int
    nbytes: int
    size_limit: int


class ChunkStore(Protocol):
    """Where computed chunks are kept. Safe for many threads and processes."""

    def get(self, expected: Header) -> ChunkKV | None:
        """The chunk, or None; a damaged or foreign entry is removed and is a miss."""

    def put(self, header: Header, kv: ChunkKV, tag: str | None = None) -> int:
        """Keep a chunk; it is durable on return. Returns the bytes written.

        Raises
        ------
        StoreError
            It cannot be written.
        """

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are stored."""

    def retag(self, tags: Mapping[str, str]) -> None:
        """Give stored chunks, by key, other tags; one of several documents has the last one's."""

    def evict(self, tag: str) -> int:
        """Remove all chunks with this tag; returns how many."""

    def stats(self) -> StoreStats:
        """Entries, bytes and limit."""

    def verify(self) -> list[str]:
        """Read everything, remove what is damaged, and say what was."""

    def close(self) -> None:
        """Release file handles."""


class DiskStore:
    """Chunks as files in a local folder.

    Parameters
    ----------
    directory : path
        Created with mode 0700. sqlite needs a local file system, not a network share.
    size_limit : int
        Bytes; the least recently used chunks go first when it is exceeded.

    Raises
    ------
    StoreError
        The folder cannot be used.
    """

    def __init__(self, directory: str | Path, size_limit: int = DEFAULT_SIZE_LIMIT) -> None:
        if size_limit <= 0:
            raise ValueError(f"The store's size limit must be positive, not {size_limit} bytes.")
        self.directory = Path(directory).expanduser()
        try:
            self.directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            self.directory.chmod(0o700)
            self._cache = diskcache.Cache(
                str(self.directory),
                disk=SafeDisk,
                size_limit=size_limit,
                eviction_policy="least-recently-used",
                tag_index=1,
                disk_min_file_size=0,
                cull_limit=0,  # diskcache would drop ten entries at once; see `_make_room`
            )
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"The chunk store at {self.directory} cannot be opened: {error}. "
                "Give a writable local folder as cache_dir, or remove a damaged one."
            ) from error
        self.size_limit = size_limit

    def get(self, expected: Header) -> ChunkKV | None:
        path = self._find(expected.key)
        if path is None:
            return None
        try:
            return decode(path, expected)
        except DamagedPayload as error:
            self._discard(expected.key, str(error))
            return None

    def put(self, header: Header, kv: ChunkKV, tag: str | None = None) -> int:
        payload = encode(kv, header)
        if len(payload) > self.size_limit:
            logger.warning(
                "A chunk of %d bytes is larger than the store's limit of %d and is not kept; "
                "raise size_limit.",
                len(payload),
                self.size_limit,
            )
            return 0
        try:
            self._cache.set(header.key, payload, tag=tag, retry=True)
            self._make_room()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"A chunk cannot be written to {self.directory}: {error}. "
                "Free some space or make the folder writable."
            ) from error
        return len(payload)

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key in self._cache}

    def retag(self, tags: Mapping[str, str]) -> None:
        with self._index() as index:
            index.executemany(
                "UPDATE Cache SET tag = :tag WHERE key = :key AND raw AND tag IS NOT :tag",
                [{"key": key, "tag": tag} for key, tag in tags.items()],
            )

    def evict(self, tag: str) -> int:
        return self._cache.evict(tag, retry=True)

    def stats(self) -> StoreStats:
        return StoreStats(
            str(self.directory), len(self._cache), self._cache.volume(), self.size_limit
        )

    def verify(self) -> list[str]:
        problems = self._remove_foreign_rows()
        for key in list(self._cache):
            path = self._find(key)
            if path is None:
                continue
            try:
                header = read_header(path)
                decode(path, Header(**{**vars(header), "key": key}), check=True)
            except DamagedPayload as error:
                self._discard(key, str(error))
                problems.append(f"{key}: {error}")
        # Files that a killed process wrote without an index row.
        problems += [
            str(warning.message)
            for warning in self._cache.check(fix=True, retry=True)
            if not issubclass(warning.category, diskcache.EmptyDirWarning)
        ]
        return problems

    def close(self) -> None:
        self._cache.close()

    def _find(self, key: str) -> Path | None:
        """Path of an entry's payload; asking for it marks it as used."""
        try:
            handle = self._cache.get(key, read=True, retry=True)
        except (UnsafeEntry, OSError) as error:
            self._discard(key, str(error))
            return None
        if handle is None:
            return None
        with handle:
            return Path(handle.name)

    def _make_room(self) -> None:
        """Drop the least recently used chunks, one by one, until the limit holds."""
        while self._cache.volume() > self.size_limit:
            with self._index() as index:
                query = "SELECT key FROM Cache WHERE raw ORDER BY access_time LIMIT 1"
                row = index.execute(query).fetchone()
            if row is None:
                break
            self._cache.delete(row[0], retry=True)

    @contextlib.contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """diskcache's own table, for what its interface does not offer."""
        index = sqlite3.connect(self.directory / "cache.db", timeout=60)
        with contextlib.closing(index), index:
            yield index

    def _remove_foreign_rows(self) -> list[str]:
        """Index rows that `put` cannot have written; their files are orphans then."""
        with self._index() as index:
            removed = index.execute(
                "DELETE FROM Cache WHERE NOT raw OR typeof(key) != 'text' OR mode != ?",
                (MODE_BINARY,),
            ).rowcount
        return [f"{removed} index rows that this store did not write"] if removed else []

    def _discard(self, key: str, why: str) -> None:
        logger.warning("Chunk %s is damaged (%s); it is removed and computed again.", key[:12], why)
        with contextlib.suppress(UnsafeEntry, OSError):
            self._cache.delete(key, retry=True)
