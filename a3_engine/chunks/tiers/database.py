"""A local store's index file: sqlite, opened for writing or for reading alone.

One connection a thread: threads may read while one writes. A connection goes with its thread.

sqlite keeps locks and counts for all connections of a process, which a forked child would inherit
in whatever state they are. So a fork waits until no thread is in sqlite, and all connections are
closed before it; whoever wants one opens it anew.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from a3_engine.chunks.patience import waiting
from a3_engine.processes import Entered, Lock

SLICE_S = 0.05  # of waiting for another process: a fork of this one waits no longer

# The last three come of tables in another form: queries that are right do not meet them.
DAMAGED = (
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
    *(sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
)


def is_damage(error: BaseException | None) -> bool:
    """Whether sqlite says that the file itself is at fault, not that it cannot be had now."""
    # The extended code's lowest byte is the code that it extends.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in DAMAGED


def as_text(content: bytes) -> str:
    """A text of the index; where it is none, with U+FFFD in place of what cannot be read."""
    return content.decode(errors="replace")


class Connection(sqlite3.Connection):
    """One that can be looked after."""


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_forks = 0


def _close_all() -> None:
    global _forks
    _forks += 1
    for connection in list(_connections):
        connection.close()


IN_SQLITE = Entered(_close_all)


class Rows(list[Any]):
    """What a statement gave, all of it."""

    rowcount = -1

    def fetchone(self) -> Any:
        return self[0] if self else None

    def fetchall(self) -> list[Any]:
        return self


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
        self._opened: list[tuple[threading.Thread, Connection]] = []
        self._opening = Lock()
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

    def execute(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> Rows:
        """All that a statement gives, by this thread's connection."""
        with IN_SQLITE:
            cursor = self._connection.execute(query, values)
            rows = Rows(cursor.fetchall())
            rows.rowcount = cursor.rowcount
            return rows

    def executemany(self, query: str, values: Iterable[Any]) -> None:
        with IN_SQLITE:
            self._connection.executemany(query, values)

    def executescript(self, script: str) -> None:
        with IN_SQLITE:
            self._connection.executescript(script)

    @contextlib.contextmanager
    def writing(self, most: float | None = None) -> Iterator[Database]:
        """A transaction that has the write lock from its start; waits ``most`` seconds for it."""
        with contextlib.ExitStack() as inside:
            with waiting(self, self._timeout if most is None else most) as seconds:
                self._begin(time.monotonic() + seconds, inside)
            try:
                yield self
                self.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self.execute("ROLLBACK")
                raise

    def _begin(self, deadline: float, inside: contextlib.ExitStack) -> None:
        while True:
            left = max(0.0, deadline - time.monotonic())
            with contextlib.ExitStack() as entered:
                entered.enter_context(IN_SQLITE)
                self.execute(f"PRAGMA busy_timeout = {int(1000 * min(left, SLICE_S))}")
                try:
                    self.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    busy = (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY
                    if not busy or left <= SLICE_S:
                        raise
                else:
                    inside.push(entered.pop_all())
                    return

    @property
    def _connection(self) -> Connection:
        """This thread's; only to be used in sqlite's turn."""
        forks, found = getattr(self._local, "db", (-1, None))
        if found is None or forks != _forks:
            found = self._connect()
            found.text_factory = as_text
            _connections.add(found)
            self._local.db = _forks, found
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
        with IN_SQLITE:
            for _, connection in gone:
                connection.close()

    def _connect(self) -> Connection:
        if not self.readonly:
            db = sqlite3.connect(
                self.path,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
                factory=Connection,
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
            factory=Connection,
        )

    def _state(self) -> tuple[object, ...]:
        found = self.path.stat()
        log = self.path.with_name(self.path.name + "-wal")
        return found.st_ino, found.st_size, found.st_mtime_ns, log.exists()
