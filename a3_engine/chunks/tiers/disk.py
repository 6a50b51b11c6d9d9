"""Chunks in a local folder: diskcache's index, one safetensors file a chunk.

A chunk is written as ``file, sync, row``, and removed as ``row, file``: a process may die anywhere
in between and leaves at worst a file that no row names. Who changes anything holds a lock for
it; under that lock every such file is an orphan, and can be removed.

The index is made of what the files say of themselves. One that is lost or damaged is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import diskcache

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.chunks.known import About, Known
from a3_engine.chunks.payload import (
    DamagedPayload,
    Header,
    Payload,
    claims,
    open_file,
    read_header,
    read_start,
)
from a3_engine.chunks.store import StoreStats
from a3_engine.chunks.tiers.database import Database, is_damage
from a3_engine.chunks.tiers.filesystem import (
    TurnLock,
    file_system,
    make_private,
    no_file,
    refuse_network_share,
    remove,
    set_aside,
    set_aside_name,
    shares_memory,
)
from a3_engine.chunks.tiers.index import Entry, Index, Note, Row, remove_old_catalogue
from a3_engine.chunks.tiers.mapped_files import Identity
from a3_engine.chunks.tiers.safe_disk import SafeDisk, UnsafeEntry
from a3_engine.errors import StoreError
from a3_engine.kv import ChunkKV
from a3_engine.processes import Lock

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 20.0
TURN_TIMEOUT = 60.0  # a crowd of writers on a slow disk takes turns
HASHED_FILES = 16_384
CHANGES = 3  # how often an entry may be exchanged by another process while it is being read
SPARE = 0.5  # of the disk's free space is left to others, where no limit is given


Parameters = ParamSpec("Parameters")
T = TypeVar("T")


def once_more(
    method: Callable[Concatenate[DiskStore, Parameters], T],
) -> Callable[Concatenate[DiskStore, Parameters], T]:
    """What met a damaged index is done again when the index has been made anew."""

    @functools.wraps(method)
    def tried(self: DiskStore, /, *args: Parameters.args, **options: Parameters.kwargs) -> T:
        kept: Any = [list(given) if isinstance(given, Iterator) else given for given in args]
        try:
            return method(self, *kept, **options)
        except StoreError as error:
            if not is_damage(error.__cause__):
                raise
            return method(self, *kept, **options)

    return tried


class DiskStore:
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
        self.directory = Path(directory).expanduser().absolute()
        self.readonly = readonly
        self._secret, self._lock_timeout = secret, lock_timeout
        self._forbidden = False  # to write, by the folder's mode
        self._opening = Lock()
        # The files whose checksum this process has compared.
        self._hashed: BoundedLRU[Identity, bool] = BoundedLRU(HASHED_FILES)
        self._open()
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

    def _open(self) -> None:
        try:
            refuse_network_share(self.directory)
            if not self.readonly:
                self.directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            if any(path.is_symlink() for path in self.directory.glob("cache.db*")):
                raise OSError("its index is a symbolic link")
            asked = self.readonly and not self._forbidden
            if not self.readonly and not os.access(self.directory, os.W_OK):
                logger.warning(
                    "The chunk store at %s is read only: what it has is used, nothing new is kept.",
                    self.directory,
                )
                self.readonly = self._forbidden = True
            if not shares_memory(self.directory):
                logger.warning(
                    "%s is on a file system (%s) that may be a network's: the index goes without "
                    "shared memory, and is slower. A local folder as cache_dir is safer.",
                    self.directory,
                    file_system(self.directory),
                )
            self._disk = SafeDisk(str(self.directory), min_file_size=0)
            self._lock = TurnLock(self.directory / "writers.lock", TURN_TIMEOUT)
            if self.readonly:
                self._open_to_read(asked)
            else:
                make_private(self.directory, 0o700)
                self._open_to_write()
        except (OSError, sqlite3.Error, diskcache.Timeout, AttributeError, TypeError) as error:
            raise StoreError(
                f"The chunk store at {self.directory} cannot be opened: {error}. "
                "Give a writable local folder as cache_dir, or remove a damaged one."
            ) from error
        self._openings = getattr(self, "_openings", 0) + 1

    def _open_to_read(self, asked: bool) -> None:
        """Whoever asks for this wants to see what there is; others are served all the same."""
        path = self.directory / "cache.db"
        if self._is_sound(path):
            return
        if asked:
            raise OSError("its index is damaged, or another version's; open it once to write")
        self._own = tempfile.TemporaryDirectory(prefix="a3-index-")
        logger.warning(
            "The index at %s is damaged, or another version's. Nothing can be written there: this "
            "process goes by one of its own, made from the chunks.",
            path,
        )
        self._make_index(Path(self._own.name) / path.name)

    def _open_to_write(self) -> None:
        path = self.directory / "cache.db"
        if not self._is_sound(path):
            with self._changing():
                self._make_index(path)
        for made in (*self.directory.glob("cache.db*"), self.directory / "writers.lock"):
            with contextlib.suppress(FileNotFoundError):
                make_private(made, 0o600)
        self._sweep_files(fix=True)
        remove_old_catalogue(self.directory.parent)

    def _is_sound(self, path: Path) -> bool:
        """Whether there is an index of this version's form that can be read; connects to it."""
        if not path.exists() or no_file(path):
            return False
        try:
            self._connect(path)
            return self._index.sound() and self._index.file_names() is not None
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return False

    def _connect(self, path: Path) -> None:
        readonly = self.readonly and path.parent == self.directory
        self._database = Database(path, self._lock_timeout, readonly=readonly)
        if not readonly and not shares_memory(path.parent):
            # No log, which needs shared memory; readers wait for writers then.
            self._database.execute("PRAGMA journal_mode = DELETE")
        self._index = Index(self._database, self._disk)

    def _make_index(self, path: Path) -> None:
        """An index of what the files say of themselves; a damaged one is kept under its name."""
        tags: list[tuple[str, str]] = []
        if path.exists():
            why = self._damage_of_index(path)
            if why is None:
                return  # another process has made it
            if not no_file(path):
                with contextlib.suppress(sqlite3.Error):
                    tags = self._index.tags()  # those of later documents are nowhere else
            logger.warning(
                "The index at %s is damaged (%s). It is kept as %s, and made anew from the chunks.",
                path,
                why,
                set_aside(path).name,
            )
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        diskcache.Cache(
            str(path.parent),
            timeout=self._lock_timeout,
            disk=SafeDisk,
            eviction_policy="none",  # diskcache would write on every read; see `Index.touch`
            cull_limit=0,  # and drop ten entries at once; see `Index.make_room`
            statistics=0,
            tag_index=0,
            disk_min_file_size=0,
            sqlite_synchronous=2,
            sqlite_mmap_size=0,
            sqlite_journal_mode="wal" if shares_memory(path.parent) else "delete",
        ).close()
        self._connect(path)
        self._index.make_tables()
        self._index.insert(self._found_again())
        self._index.note(Note("", key, About(None, tag)) for key, tag in tags)
        self._index.seal()

    def _damage_of_index(self, path: Path) -> str | None:
        if odd := no_file(path):
            return f"{odd.name} is no file"
        try:
            self._connect(path)
            if problem := next(iter(self._index.problems()), None):
                return problem
            return None if self._index.sound() else "its tables have another form"
        except sqlite3.Error as error:
            if is_damage(error):
                return str(error)
            raise

    def _make_anew(self, why: str) -> None:
        """After sqlite has found the index damaged while it was in use."""
        logger.warning("The index of the chunk store at %s: %s.", self.directory, why)
        with self._opening:
            self._disk.opened.clear()
            self._hashed.clear()
            try:
                if self.readonly:
                    self._open()
                else:
                    with self._changing():
                        self._make_index(self.directory / "cache.db")
            except (OSError, sqlite3.Error, diskcache.Timeout, StoreError) as error:
                logger.warning("It cannot be made anew: %s.", error)
            self._openings += 1

    def _found_again(self) -> Iterator[Entry]:
        """What the files say of themselves; `get` checks whether it is true."""
        for name in sorted(self._disk.files()):
            try:
                path = self._disk.path(name)
                header, about = claims(read_start(path))
                found = path.stat()
            except (DamagedPayload, UnsafeEntry, OSError):
                continue
            note = Note(header.engine, header.key, About.from_json(about))
            yield Entry(note, name, found.st_size, found.st_mtime)

    def _half_of_the_disk(self) -> int:
        free = shutil.disk_usage(self.directory).free
        with self._errors("The index cannot be read in"):
            return int(SPARE * free) + self._index.volume()

    def _reopen_if_replaced(self) -> None:
        if self._database.replaced():
            with self._opening:
                if self._database.replaced():
                    if not self.readonly:
                        logger.warning(
                            "The chunk store at %s was replaced; opening it anew.", self.directory
                        )
                    self._hashed.clear()
                    self._open()

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

    def _clean_up(self) -> None:
        """After a write that failed, on a full disk say: leave no file."""
        with contextlib.suppress(OSError, sqlite3.Error):
            self._sweep_files(fix=True)

    def _sweep_files(self, fix: bool) -> list[str]:
        """Files that killed processes left without a row; skipped while anybody writes."""
        if self.readonly:
            return []
        with self._lock.at_once() as free:
            if not free:
                return []
            orphans = self._disk.files() - self._index.file_names()
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
        except (OSError, sqlite3.Error) as error:
            if is_damage(error):
                self._make_anew(str(error))
            raise StoreError(
                f"{what} {self.directory}: {error}. "
                "Free some space, make the folder writable, or remove a damaged one."
            ) from error
