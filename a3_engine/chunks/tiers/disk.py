"""Chunks in a local folder: diskcache's index, one safetensors file a chunk.

A chunk is written as ``file, sync, row``, and removed as ``row, file``: a process may die anywhere
in between and leaves at worst a file that no row names. Who changes anything holds a lock for
it; under that lock every such file is an orphan, and can be removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import diskcache

from a3_engine.chunks.payload import DamagedPayload, Header, Payload, open_file, read_header
from a3_engine.chunks.store import DEFAULT_SIZE_LIMIT, StoreStats
from a3_engine.chunks.tiers.filesystem import TurnLock, refuse_network_share
from a3_engine.chunks.tiers.index import Index, Row
from a3_engine.chunks.tiers.opened import Identity
from a3_engine.chunks.tiers.safe_disk import SafeDisk, UnsafeEntry
from a3_engine.errors import StoreError

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 20.0
TURN_TIMEOUT = 60.0  # a crowd of writers on a slow disk takes turns
HASHED_FILES = 16_384
CHANGES = 3  # how often an entry may be exchanged by another process while it is being read


class DiskStore:
    """Chunks as files in a local folder.

    Parameters
    ----------
    directory : path
        Created with mode 0700. sqlite needs a local file system; a network share is refused.
    size_limit : int
        Bytes; the least recently used chunks go first when it is exceeded.
    secret : bytes or None
        See `StoreOptions`.
    lock_timeout : float
        Seconds that a write waits for another process's. Reads do not wait.

    Raises
    ------
    StoreError
        The folder cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        size_limit: int = DEFAULT_SIZE_LIMIT,
        *,
        secret: bytes | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        if size_limit <= 0:
            raise ValueError(f"The store's size limit must be positive, not {size_limit} bytes.")
        self.directory = Path(directory).expanduser()
        self.size_limit = size_limit
        self._secret, self._lock_timeout = secret, lock_timeout
        self._opening = threading.Lock()
        # The files whose checksum this process has compared.
        self._hashed: OrderedDict[Identity, None] = OrderedDict()
        self._open()

    def get(self, expected: Header) -> Payload | None:
        try:
            self._reopen_if_replaced()
            for _ in range(CHANGES):
                name = self._index.find(expected.key)
                if name is None:
                    return None
                try:
                    return self._read(name, expected)
                except (DamagedPayload, UnsafeEntry) as error:
                    # Unless another process has just exchanged or removed the entry.
                    if self._index.find(expected.key) == name:
                        self._drop(expected.key, name, str(error))
                        return None
        except (sqlite3.Error, OSError, StoreError) as error:
            logger.warning("The chunk store at %s cannot be read: %s.", self.directory, error)
        return None

    def put(self, payload: Payload, tag: str | None = None) -> int:
        content = payload.to_bytes(self._secret)
        if len(content) > self.size_limit:
            logger.warning(
                "A chunk of %d bytes is larger than the store's limit of %d and is not kept; "
                "raise size_limit.",
                len(content),
                self.size_limit,
            )
            return 0
        with self._errors("A chunk cannot be written to"):
            self._reopen_if_replaced()
            try:
                with self._changing():
                    self._cache.set(payload.header.key, content, tag=tag)
                    self._index.touch([payload.header.key])
                    self._index.make_room(self.size_limit)
            except (OSError, sqlite3.Error, diskcache.Timeout):
                self._clean_up()
                raise
        return len(content)

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        with self._errors("The index cannot be read in"):
            return {key for key in keys if self._index.contains(key)}

    def touch(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        try:
            self._index.touch(keys)
        except sqlite3.Error as error:
            logger.warning("The chunk store at %s cannot be written: %s.", self.directory, error)

    def retag(self, tags: Mapping[str, str]) -> None:
        if tags:
            with self._errors("Tags cannot be written in"):
                self._index.retag(tags)

    def evict(self, tag: str) -> set[str]:
        with self._errors("Chunks cannot be removed from"), self._changing():
            return self._index.remove("tag = ?", (tag,))

    def discard(self, keys: Iterable[str]) -> None:
        with self._errors("Chunks cannot be removed from"), self._changing():
            self._index.remove_keys(keys)

    def shrink(self, nbytes: int) -> set[str]:
        """Remove the least recently used chunks until the store takes at most so many bytes."""
        with self._errors("Chunks cannot be removed from"), self._changing():
            return self._index.make_room(nbytes)

    def evict_unused(self, before: float) -> set[str]:
        """Remove what was last used before a time, in seconds since the epoch."""
        with self._errors("Chunks cannot be removed from"), self._changing():
            return self._index.remove("access_time < ?", (before,))

    def entries(self) -> Iterator[tuple[Row, Path]]:
        """Every entry and its file, the least recently used first; unsafe rows are left out."""
        for row in self._index.rows():
            with contextlib.suppress(UnsafeEntry):
                yield row, self._disk.path(row.filename)

    def stats(self) -> StoreStats:
        with self._errors("The index cannot be read in"):
            count, volume = self._index.count(), self._index.volume()
        return StoreStats(str(self.directory), count, volume, self.size_limit)

    def verify(self, *, fix: bool = True) -> list[str]:
        with self._errors("The store cannot be checked:"):
            problems = self._index.problems()
            if fix and (foreign := self._index.sweep_rows()):
                problems.append(f"{foreign} index rows that this store did not write")
            for row in list(self._index.rows()):
                why = self._damage(row)
                if why is None or self._index.find(row.key) != row.filename:
                    continue  # sound, or exchanged meanwhile
                problems.append(f"{row.key}: {why}")
                if fix:
                    self._drop(row.key, row.filename, why)
            problems += self._sweep_files(fix)
            if fix:
                self._index.recount()
        return problems

    def close(self) -> None:
        self._disk.opened.clear()
        self._cache.close()
        self._index.close()

    def _open(self) -> None:
        try:
            refuse_network_share(self.directory)
            self.directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            self.directory.chmod(0o700)
            if any(path.is_symlink() for path in self.directory.glob("cache.db*")):
                raise OSError("its index is a symbolic link")
            self._cache = diskcache.Cache(
                str(self.directory),
                timeout=self._lock_timeout,
                disk=SafeDisk,
                size_limit=self.size_limit,
                eviction_policy="none",  # diskcache would write on every read; see `Index.touch`
                cull_limit=0,  # and drop ten entries at once; see `Index.make_room`
                statistics=0,
                tag_index=1,
                disk_min_file_size=0,
                sqlite_synchronous=2,  # a committed row survives a power cut
            )
            self._disk: SafeDisk = self._cache.disk
            self._index = Index(self.directory, self._disk, self._lock_timeout)
            self._lock = TurnLock(self.directory / "writers.lock", TURN_TIMEOUT)
            self._sweep_files(fix=True)
        except (OSError, sqlite3.Error, diskcache.Timeout, AttributeError, TypeError) as error:
            raise StoreError(
                f"The chunk store at {self.directory} cannot be opened: {error}. "
                "Give a writable local folder as cache_dir, or remove a damaged one."
            ) from error

    def _reopen_if_replaced(self) -> None:
        if self._index.replaced():
            with self._opening:
                if self._index.replaced():
                    logger.warning(
                        "The chunk store at %s was replaced; opening it anew.", self.directory
                    )
                    self._hashed.clear()
                    self._open()

    def _read(self, name: object, expected: Header) -> Payload:
        path, found = self._disk.found(name)
        if found is None:
            raise DamagedPayload("its file is not there")
        times = found.st_mtime_ns, found.st_ctime_ns
        identity = (str(name), found.st_ino, found.st_size, *times)
        if (opened := self._disk.opened.get(identity, expected)) is not None:
            return opened
        payload = open_file(Path(path), expected, self._secret, hashed=identity in self._hashed)
        self._hashed[identity] = None
        if len(self._hashed) > HASHED_FILES:
            with contextlib.suppress(KeyError):
                self._hashed.popitem(last=False)
        if self._secret is None:  # what is sealed is checked whenever it is used
            self._disk.opened.keep(identity, payload)
            if not os.path.exists(path):  # removed meanwhile
                self._disk.opened.forget(str(name))
        return payload

    def _damage(self, row: Row) -> str | None:
        try:
            path = self._disk.path(row.filename)
            header = read_header(path)
            if header.key != row.key:
                raise DamagedPayload("its payload is another chunk's")
            open_file(path, header, self._secret, hashed=False)
        except (DamagedPayload, UnsafeEntry) as error:
            return str(error)
        return None

    def _drop(self, key: str, name: object, why: str) -> None:
        logger.warning("Chunk %s is damaged (%s); it is removed and computed again.", key[:12], why)
        with self._changing():
            self._index.remove("key = ? AND filename IS ?", (key, name))

    def _clean_up(self) -> None:
        """After a write that failed, on a full disk say: leave no transaction and no file."""
        self._cache.close()
        with contextlib.suppress(OSError, sqlite3.Error):
            self._sweep_files(fix=True)

    def _sweep_files(self, fix: bool) -> list[str]:
        """Files that killed processes left without a row; skipped while anybody writes."""
        with self._lock.at_once() as free:
            if not free:
                return []
            orphans = self._disk.files() - {row.filename for row in self._index.rows()}
            if fix:
                for name in orphans:
                    self._disk.remove(name)
        return [f"unknown file: {self.directory / name}" for name in sorted(orphans)]

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        """Held between a file and its row, so that no sweep takes the file for an orphan."""
        return self._lock.turn()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except diskcache.Timeout as error:
            raise StoreError(
                f"{what} {self.directory}: another process has locked the index for more than "
                f"{self._lock_timeout:g} seconds."
            ) from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{what} {self.directory}: {error}. "
                "Free some space, make the folder writable, or remove a damaged one."
            ) from error
