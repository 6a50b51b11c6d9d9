"""Chunks in a local folder: diskcache's index, one safetensors file a chunk.

A chunk is written as ``file, sync, row``, and removed as ``row, file``: a process may die anywhere
in between and leaves at worst a file that no row names. Who changes anything holds a lock for
it; under that lock every such file is an orphan, and can be removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from a3_engine.chunks.known import About, Known
from a3_engine.chunks.payload import (
    DamagedPayload,
    Header,
    Payload,
    open_file,
    read_header,
)
from a3_engine.chunks.store import StoreStats
from a3_engine.chunks.tiers.filesystem import (
    remove,
    set_aside_name,
)
from a3_engine.chunks.tiers.index import Entry, Note, Row
from a3_engine.chunks.tiers.indexed_folder import IndexedFolder, once_more
from a3_engine.chunks.tiers.safe_disk import UnsafeEntry
from a3_engine.errors import StoreError
from a3_engine.kv import ChunkKV

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 20.0
CHANGES = 3  # how often an entry may be exchanged by another process while it is being read
SPARE = 0.5  # of the disk's free space is left to others, where no limit is given


class DiskStore(IndexedFolder):
    """Chunks as files in a local folder.

    Parameters
    ----------
    directory : path
        Created with mode 0700. sqlite needs a local file system; a network share is refused.
    size_limit : int or None
        Bytes; the least recently used chunks go first when it is exceeded. None is half of what the
        disk has free, beside what is stored.
    secret : bytes or None
        See `StoreOptions`.
    lock_timeout : float
        Seconds that a write waits for another process's, outside a request. Reads do not wait.
    readonly : bool
        Change nothing. A folder that this process may not write is opened so, with a warning.

    Raises
    ------
    StoreError
        The folder cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        size_limit: int | None = None,
        *,
        secret: bytes | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
        readonly: bool = False,
    ) -> None:
        if size_limit is not None and size_limit <= 0:
            raise ValueError(f"The store's size limit must be positive, not {size_limit} bytes.")
        super().__init__(directory, secret, lock_timeout, readonly)
        self.size_limit = size_limit or self._half_of_the_disk()

    @property
    def local(self) -> DiskStore:
        return self

    def get(self, expected: Header) -> Payload | None:
        try:
            return self._found(expected)
        except StoreError as error:
            logger.warning("A chunk counts as missing. %s", error)
            return None

    @once_more
    def put(self, payload: Payload, tag: str | None = None) -> int:
        content = payload.to_bytes(self._secret)
        if self.readonly:
            return 0
        if len(content) > self.size_limit:
            logger.warning(
                "A chunk of %d bytes is larger than the store's limit of %d and is not kept; "
                "raise size_limit.",
                len(content),
                self.size_limit,
            )
            return 0
        about = About.from_json(payload.about)
        note = Note(payload.header.engine, payload.header.key, About(about.known, tag))
        with self._errors("A chunk cannot be written to"):
            self._reopen_if_replaced()
            try:
                with self._changing():
                    name = self._disk.store(content, False)[2]
                    assert name is not None
                    self._index.insert([Entry(note, name, len(content), time.time())])
                    self._index.make_room(self.size_limit)
            except (OSError, sqlite3.Error):
                self._clean_up()
                raise
        return len(content)

    def keep_decoded(self, payload: Payload, kv: ChunkKV) -> None:
        pass  # nothing is in memory here

    @once_more
    def contains_many(self, keys: Iterable[str]) -> set[str]:
        with self._errors("The index cannot be read in"):
            return {key for key in keys if self._index.contains(key)}

    def touch(self, keys: Sequence[str]) -> None:
        if not keys or self.readonly:
            return
        try:
            self._index.touch(keys)
        except sqlite3.Error as error:
            logger.warning("The chunk store at %s cannot be written: %s.", self.directory, error)

    @once_more
    def note(self, notes: Iterable[Note]) -> None:
        """Remember texts and tags of chunks, stored or not. Raises `StoreError`."""
        if not self.readonly:
            with self._errors("Tags cannot be written in"):
                self._reopen_if_replaced()
                self._index.note(notes)

    def retag(self, tags: Mapping[str, str]) -> None:
        self.note(Note("", key, About(None, tag)) for key, tag in tags.items())

    @once_more
    def tagged(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a tag."""
        with self._errors("The index cannot be read in"):
            return self._index.tagged(keys)

    @once_more
    def texts(self, engine: str, after: int) -> tuple[tuple[int, int], int, list[Known]]:
        """What an engine's catalogue reads: all that was noted after a number.

        Returns
        -------
        tuple
            What changes when something was forgotten, so that all has to be read again; the number
            of the last text; the texts.
        """
        with self._errors("The index cannot be read in"):
            self._reopen_if_replaced()
            return (self._openings, self._index.evictions()), *self._index.texts(engine, after)

    @once_more
    def used_since(self, keys: Iterable[str], since: float) -> set[str]:
        """Those of the keys that are stored, and were used after a time in seconds."""
        with self._errors("The index cannot be read in"):
            return {key for key in keys if self._index.contains(key, since)}

    @once_more
    def expire(self, tags: str, before: float) -> set[str]:
        """Remove what has a tag that begins so, and was last used before a time in seconds."""
        with self._errors("Chunks cannot be removed from"):
            if self.readonly or not self._index.expired(tags, before):
                return set()
            with self._changing():
                gone = self._index.remove_keys(self._index.expired(tags, before))
                self._index.forget_tags(tags)
                self._index.wipe()
                return gone

    @once_more
    def state(self) -> str:
        """What stays the same as long as all that was stored is there."""
        with self._errors("The index cannot be read in"):
            self._reopen_if_replaced()
            return self._index.state()

    @once_more
    def text_rows(self, tag: str | None = None) -> list[list[object]]:
        """Every engine's ``[engine, key, text]``, of one tag where given; see `Index`."""
        with self._errors("The index cannot be read in"):
            return self._index.text_rows(tag)

    @once_more
    def evict(self, tag: str, also: Iterable[str] = ()) -> set[str]:
        with self._errors("Chunks cannot be removed from"), self._changing():
            untagged = set(also) - self._index.tagged(also)
            gone = self._index.remove_keys(self._index.take_tag(tag) | untagged)
            self._index.wipe()
            remove(set_aside_name(self._database.path))  # which may hold its words and tags
        return gone

    @once_more
    def discard(self, keys: Iterable[str]) -> None:
        with self._errors("Chunks cannot be removed from"), self._changing():
            self._index.remove_keys(keys)

    @once_more
    def shrink(self, nbytes: int) -> set[str]:
        """Remove the least recently used chunks until the store takes at most ``nbytes``."""
        with self._errors("Chunks cannot be removed from"), self._changing():
            return self._index.make_room(nbytes)

    @once_more
    def evict_unused(self, before: float) -> set[str]:
        """Remove what was last used before a time, in seconds since the epoch."""
        with self._errors("Chunks cannot be removed from"), self._changing():
            return self._index.remove("access_time < ?", (before,))

    def entries(self) -> Iterator[tuple[Row, Path]]:
        """Every entry and its file, the least recently used first; unsafe rows are left out."""
        for row in self._index.rows():
            with contextlib.suppress(UnsafeEntry):
                yield row, self._disk.path(row.filename)

    @once_more
    def stats(self) -> StoreStats:
        with self._errors("The index cannot be read in"):
            count, volume = self._index.count(), self._index.volume()
        return StoreStats(str(self.directory), count, volume, self.size_limit)

    @once_more
    def verify(self, *, fix: bool = True) -> list[str]:
        with self._errors("The store cannot be checked:"):
            if (problems := self._index.problems()) and fix:
                self._make_anew(problems[0])
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
        self._database.close()

    def _half_of_the_disk(self) -> int:
        free = shutil.disk_usage(self.directory).free
        with self._errors("The index cannot be read in"):
            return int(SPARE * free) + self._index.volume()

    @once_more
    def _found(self, expected: Header) -> Payload | None:
        with self._errors("The index cannot be read in"):
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
        return None

    def _read(self, name: object, expected: Header) -> Payload:
        path, found = self._disk.found(name)
        if found is None:
            raise DamagedPayload("its file is not there")
        times = found.st_mtime_ns, found.st_ctime_ns
        identity = (str(name), found.st_ino, found.st_size, *times)
        opened = self._disk.opened.get(identity)
        if opened is not None and opened.header == expected:
            return opened
        known = self._hashed.get(identity) is not None
        payload = open_file(Path(path), expected, self._secret, hashed=known)
        self._hashed.put(identity, True)
        if self._secret is None:  # what is sealed is checked whenever it is used
            self._disk.opened.put(identity, payload)
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
        if self.readonly:
            logger.warning("Chunk %s is damaged (%s), and not used.", key[:12], why)
            return
        logger.warning("Chunk %s is damaged (%s); it is removed and computed again.", key[:12], why)
        with self._changing():
            self._index.remove("key = ? AND filename IS ?", (key, name))
