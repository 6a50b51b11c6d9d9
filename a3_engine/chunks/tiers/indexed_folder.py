"""A local folder of chunk files with its index: opened, checked, and the index made anew.

The index is made of what the files say of themselves. One that is lost or damaged is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import diskcache

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.chunks.known import About
from a3_engine.chunks.payload import (
    DamagedPayload,
    claims,
    read_start,
)
from a3_engine.chunks.tiers.database import Database, is_damage
from a3_engine.chunks.tiers.filesystem import (
    TurnLock,
    file_system,
    make_private,
    no_file,
    refuse_network_share,
    set_aside,
    shares_memory,
)
from a3_engine.chunks.tiers.index import Entry, Index, Note, remove_old_catalogue
from a3_engine.chunks.tiers.mapped_files import Identity
from a3_engine.chunks.tiers.safe_disk import SafeDisk, UnsafeEntry
from a3_engine.errors import StoreError
from a3_engine.processes import Lock

logger = logging.getLogger(__name__)

TURN_TIMEOUT = 60.0  # a crowd of writers on a slow disk takes turns
HASHED_FILES = 16_384

Parameters = ParamSpec("Parameters")
T = TypeVar("T")
Folder = TypeVar("Folder", bound="IndexedFolder")


def once_more(
    method: Callable[Concatenate[Folder, Parameters], T],
) -> Callable[Concatenate[Folder, Parameters], T]:
    """What met a damaged index is done again when the index has been made anew."""

    @functools.wraps(method)
    def tried(self: Folder, /, *args: Parameters.args, **options: Parameters.kwargs) -> T:
        kept: Any = [list(given) if isinstance(given, Iterator) else given for given in args]
        try:
            return method(self, *kept, **options)
        except StoreError as error:
            if not is_damage(error.__cause__):
                raise
            return method(self, *kept, **options)

    return tried


class IndexedFolder:
    """What a store of files goes by: the folder, its index, and the lock of those who write.

    Parameters
    ----------
    directory, secret, lock_timeout, readonly
        See :class:`~a3_engine.chunks.tiers.disk.DiskStore`.

    Raises
    ------
    StoreError
        The folder cannot be used.
    """

    def __init__(
        self, directory: str | Path, secret: bytes | None, lock_timeout: float, readonly: bool
    ) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.readonly = readonly
        self._secret, self._lock_timeout = secret, lock_timeout
        self._forbidden = False  # to write, by the folder's mode
        self._opening = Lock()
        # The files whose checksum this process has compared.
        self._hashed: BoundedLRU[Identity, bool] = BoundedLRU(HASHED_FILES)
        self._openings = 0
        self._open()

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
        self._openings += 1

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
