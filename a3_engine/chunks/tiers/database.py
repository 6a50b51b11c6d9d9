"""A local store's index file: sqlite, opened for writing or for reading alone.

One connection a thread: threads may read while one writes. A connection goes with its thread, and a
forked child makes its own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from a3_engine.chunks.patience import waiting
from a3_engine.processes import Lock

# The last three come of tables in another form: queries that are right do not meet them.
DAMAGED = (
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
    *(sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
)


def is_damage(error: Exception) -> bool:
    """Whether sqlite says that the file itself is at fault, not that it cannot be had now."""
    # The extended code's lowest byte is the code that it extends.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in DAMAGED


def as_text(content: bytes) -> str:
    """A text of the index; where it is none, with U+FFFD in place of what cannot be read."""
    return content.decode(errors="replace")


class Database:
    """Connections to one file.

    Parameters
    ----------
    path : path
        Of a database that is there.
    timeout : float
        Seconds that a write waits for another process's, outside a request.
    readonly : bool
        Nothing is written, also no file beside it.
    """

    def __init__(self, path: Path, timeout: float, *, readonly: bool = False) -> None:
        self.readonly = readonly
        self.path, self._timeout = path, timeout
        self._local = threading.local()
        self._opened: list[tuple[threading.Thread, sqlite3.Connection]] = []
        self._opening = Lock()
        self._pid = os.getpid()
        self._inode = path.stat().st_ino
        self._as_read = self._state()

    def replaced(self) -> bool:
        """Whether somebody has removed or exchanged the file under our feet."""
        try:
            if self.readonly:
                return self._state() != self._as_read
            return self.path.stat().st_ino != self._inode
        except OSError:
            return True

    @contextlib.contextmanager
    def writing(self, most: float | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction that has the write lock from its start; waits ``most`` seconds for it."""
        db = self.connection
        with waiting(self, self._timeout if most is None else most) as seconds:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
            db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's."""
        if self._pid != os.getpid():  # a connection must not be used, or closed, behind a fork
            self._pid = os.getpid()
            _left_by_fork.append((self._local, self._opened))
            self._local, self._opened = threading.local(), []
        found: sqlite3.Connection | None = getattr(self._local, "db", None)
        if found is None:
            found = self._local.db = self._connect()
            found.text_factory = as_text
            with self._opening:
                # A connection is part of a circle, so that it does not close with its thread.
                gone = [(t, db) for t, db in self._opened if not t.is_alive()]
                self._opened = [held for held in self._opened if held not in gone]
                self._opened.append((threading.current_thread(), found))
            for _, connection in gone:
                connection.close()
        return found

    def close(self) -> None:
        """Close this thread's connection, and those of threads that are gone."""
        mine = threading.current_thread()
        self._local.__dict__.pop("db", None)
        with self._opening:
            gone = [(t, db) for t, db in self._opened if t is mine or not t.is_alive()]
            self._opened = [held for held in self._opened if held not in gone]
        for _, connection in gone:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not self.readonly:
            db = sqlite3.connect(
                self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
            )
            # What is deleted is overwritten: heads of texts, and tags.
            db.execute("PRAGMA secure_delete = ON")
            return db
        # Without a log nobody has it open for writing, and sqlite need not make files beside it.
        log = self.path.with_name(self.path.name + "-wal")
        mode = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
        )

    def _state(self) -> tuple[object, ...]:
        found = self.path.stat()
        log = self.path.with_name(self.path.name + "-wal")
        return found.st_ino, found.st_size, found.st_mtime_ns, log.exists()


_left_by_fork: list[object] = []  # kept: closing them would release the parent's locks
