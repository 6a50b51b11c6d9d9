"""diskcache's table, read and written by what diskcache itself does not offer.

Reads never wait for a writer: they take no lock, and marking what was used gives up soon. The order
of use follows the clock, but never goes back when the clock does.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diskcache.core import MODE_BINARY

from a3_engine.chunks.tiers.safe_disk import SafeDisk

# A row that `put` can have written; the rest is not looked at, and `sweep_rows` removes it.
OURS = f"raw = 1 AND typeof(key) = 'text' AND mode = {MODE_BINARY} AND value IS NULL"
LATER = "max(:now, (SELECT coalesce(max(access_time), 0) + 1e-6 FROM Cache))"
MARK_TIMEOUT_MS = 50  # at the end of a request, which does not wait longer for this


class Row(NamedTuple):
    """One entry of the index; times are seconds since the epoch."""

    key: str
    filename: Any
    nbytes: int
    stored: float
    used: float
    tag: str | None


class Index:
    """Rows of one store's ``cache.db``; one connection a thread."""

    def __init__(self, directory: Path, disk: SafeDisk, lock_timeout: float) -> None:
        self._path = directory / "cache.db"
        self._disk = disk
        self._timeout = lock_timeout
        self._local = threading.local()
        self.inode = self._path.stat().st_ino
        with self.writing() as db:
            db.execute("CREATE INDEX IF NOT EXISTS Cache_access_time ON Cache (access_time)")

    def find(self, key: str) -> Any:
        """The name of an entry's file; None where there is no entry."""
        query = f"SELECT filename FROM Cache WHERE key = ? AND {OURS}"
        (filename,) = self._db.execute(query, (key,)).fetchone() or (None,)
        return filename

    def touch(self, keys: Sequence[str]) -> None:
        """Mark entries as the last used, unless somebody else keeps writing."""
        db, now = self._db, time.time()
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute(f"PRAGMA busy_timeout = {MARK_TIMEOUT_MS}")
            try:
                with self.writing():
                    db.executemany(
                        f"UPDATE Cache SET access_time = {LATER} WHERE key = :key AND {OURS}",
                        [{"now": now, "key": key} for key in keys],
                    )
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(1000 * self._timeout)}")

    def contains(self, key: str) -> bool:
        query = f"SELECT 1 FROM Cache WHERE key = ? AND {OURS}"
        return self._db.execute(query, (key,)).fetchone() is not None

    def rows(self) -> Iterator[Row]:
        """All entries, the least recently used first."""
        query = "SELECT key, filename, size, store_time, access_time, tag FROM Cache WHERE "
        for row in self._db.execute(query + OURS + " ORDER BY access_time").fetchall():
            yield Row(*row)

    def retag(self, tags: Mapping[str, str]) -> None:
        with self.writing() as db:
            db.executemany(
                f"UPDATE Cache SET tag = :tag WHERE key = :key AND {OURS} AND tag IS NOT :tag",
                [{"key": key, "tag": tag} for key, tag in tags.items()],
            )

    def remove(self, where: str, parameters: Sequence[Any]) -> set[str]:
        """Remove the entries of a condition, rows first; returns their keys."""
        values = tuple(parameters)
        try:
            return self._unlink(self._delete(where, values))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
        # Removing a row takes room too. A row without a file is a miss.
        query = f"SELECT key, filename FROM Cache WHERE ({where})"
        rows = self._db.execute(query, values).fetchall()
        keys = self._unlink(rows)
        self._delete(where, values)
        return keys

    def remove_keys(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.remove("key = ?", (key,))

    def make_room(self, limit: int) -> set[str]:
        """Remove the least recently used entries, no more than it takes for the store to fit."""
        excess = self.volume() - limit
        if excess <= 0:
            return set()
        oldest = []
        query = "SELECT rowid, max(CAST(size AS INTEGER), 0) FROM Cache ORDER BY access_time"
        for rowid, nbytes in self._db.execute(query):
            oldest.append(rowid)
            excess -= nbytes
            if excess <= 0:
                break
        return self.remove(f"rowid IN ({','.join(map(str, oldest))})", ())

    def sweep_rows(self) -> int:
        """Remove the rows that `put` cannot have written; their files are orphans then."""
        with self.writing() as db:
            return db.execute(f"DELETE FROM Cache WHERE NOT coalesce({OURS}, 0)").rowcount

    def recount(self) -> None:
        """Correct the counters of entries and bytes."""
        with self.writing() as db:
            for name, query in (("count", "count(*)"), ("size", "coalesce(sum(size), 0)")):
                db.execute(
                    f"UPDATE Settings SET value = (SELECT {query} FROM Cache) WHERE key = ?",
                    (name,),
                )

    def count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM Cache").fetchone()[0])

    def volume(self) -> int:
        """Bytes of the payloads and of the index itself."""
        query = "SELECT coalesce(sum(CAST(value AS INTEGER)), 0) FROM Settings WHERE key = 'size'"
        (payloads,) = self._db.execute(query).fetchone()
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (page,) = self._db.execute("PRAGMA page_size").fetchone()
        return payloads + pages * page

    def problems(self) -> list[str]:
        """What sqlite itself finds wrong."""
        found = [str(message) for (message,) in self._db.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else [f"index: {message}" for message in found]

    def replaced(self) -> bool:
        """Whether somebody has removed or exchanged the folder under our feet."""
        try:
            return self._path.stat().st_ino != self.inode
        except OSError:
            return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the write lock from its start."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with them."""
        db = self._local.__dict__.pop("db", None)
        if db is not None:
            db.close()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._local.__dict__.get("pid") != os.getpid():  # a fork must not share connections
            self._local.__dict__.pop("db", None)
            self._local.pid = os.getpid()
        if "db" not in self._local.__dict__:
            db = sqlite3.connect(self._path, timeout=self._timeout, isolation_level=None)
            # A mark of use may be lost in a power cut; entries themselves are written by diskcache.
            db.execute("PRAGMA synchronous = NORMAL")
            self._local.db = db
        return self._local.__dict__["db"]

    def _delete(self, where: str, values: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        with self.writing() as db:
            query = f"DELETE FROM Cache WHERE ({where}) RETURNING key, filename"
            return db.execute(query, values).fetchall()

    def _unlink(self, rows: Iterable[tuple[Any, Any]]) -> set[str]:
        keys = set()
        for key, filename in rows:
            self._disk.remove(filename)
            if isinstance(key, str):
                keys.add(key)
        return keys
