"""The texts of stored chunks, to find them again inside a finished prompt.

A framework may hand over nothing but one long string. Every text of a stored chunk that stands in
it, to the letter, can be served from the cache. The first `ANCHOR` characters of each text lead to
its possible lengths; a hash of the whole text decides. Only hashes and anchors are kept on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from a3_engine.errors import StoreError

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 20.0
ANCHOR = 32  # shorter texts are not matched: they would be found where nobody meant them

SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    engine TEXT NOT NULL, sha256 TEXT NOT NULL, anchor TEXT NOT NULL, chars INTEGER NOT NULL,
    tag TEXT, UNIQUE (engine, sha256)
);
CREATE TABLE IF NOT EXISTS evictions (id INTEGER PRIMARY KEY AUTOINCREMENT);
"""
INSERT = (
    "INSERT INTO texts (engine, sha256, anchor, chars, tag) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT DO UPDATE SET tag = excluded.tag WHERE excluded.tag IS NOT NULL"
)


class Match(NamedTuple):
    """A known text at ``text[start:stop]``, and the tag that it was remembered with."""

    start: int
    stop: int
    tag: str | None = None


class Catalogue:
    """Texts known to one engine, shared by all processes that use the same folder.

    Parameters
    ----------
    path : path
        sqlite file.
    engine : str
        Fingerprint; texts of other engines are not seen.
    """

    def __init__(self, path: Path, engine: str) -> None:
        self._engine, self._path = engine, path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                path, timeout=LOCK_TIMEOUT, check_same_thread=False, isolation_level=None
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(
                f"The catalogue at {path} cannot be opened: {error}. Give a writable local folder "
                "as cache_dir, or remove a damaged file."
            ) from error
        self._seen = self._evictions = 0
        self._anchors: dict[str, dict[int, dict[str, str | None]]] = {}

    def add(self, texts: Iterable[tuple[str, str | None]]) -> None:
        """Remember ``(text, tag)`` pairs, but for texts shorter than `ANCHOR` characters."""
        rows = [
            (self._engine, _sha256(text), text[:ANCHOR], len(text), tag)
            for text, tag in texts
            if len(text) >= ANCHOR
        ]
        with self._writing():
            self._db.executemany(INSERT, rows)

    def forget(self, tag: str) -> None:
        """Forget the texts with this tag."""
        with self._writing():
            self._db.execute("DELETE FROM texts WHERE tag = ?", (tag,))
            self._db.execute("INSERT INTO evictions DEFAULT VALUES")

    def rows(self, tag: str | None = None) -> list[list[Any]]:
        """Every engine's ``[engine, sha256, anchor, chars, tag]``, of one tag where given."""
        query = "SELECT engine, sha256, anchor, chars, tag FROM texts WHERE ? IS NULL OR tag = ?"
        with self._lock:
            return [list(row) for row in self._db.execute(query, (tag, tag))]

    def add_rows(self, rows: Iterable[Any]) -> None:
        """Take over what `rows` gave elsewhere; what cannot be such a row is left out."""
        kinds = (str, str, str, int, str | None)
        sound = [
            row
            for row in rows
            if isinstance(row, list)
            and len(row) == len(kinds)
            and all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True))
            and len(row[2]) == ANCHOR <= row[3]
        ]
        with self._writing():
            self._db.executemany(INSERT, sound)

    def find(self, text: str) -> list[Match]:
        """Known texts inside ``text``, leftmost first, the longest where several begin together."""
        with self._lock:
            try:
                self._refresh()
            except sqlite3.Error as error:  # what is known already still serves
                logger.warning("The catalogue at %s cannot be read: %s.", self._path, error)
            anchors = self._anchors
            matches, at = [], 0
            while at + ANCHOR <= len(text):
                lengths = anchors.get(text[at : at + ANCHOR])
                match = self._longest(text, at, lengths) if lengths else None
                if match is None:
                    at += 1
                else:
                    matches.append(match)
                    at = match.stop
            return matches

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction; one that cannot be done raises `StoreError`."""
        try:
            with self._lock, self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.Error as error:
            raise StoreError(
                f"The catalogue at {self._path} cannot be written: {error}."
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @staticmethod
    def _longest(text: str, start: int, lengths: dict[int, dict[str, str | None]]) -> Match | None:
        for chars in sorted(lengths, reverse=True):
            stop = start + chars
            if stop <= len(text) and (known := _sha256(text[start:stop])) in lengths[chars]:
                return Match(start, stop, lengths[chars][known])
        return None

    def _refresh(self) -> None:
        """Read what this or another process has added since; all of it after a removal."""
        (evictions,) = self._db.execute("SELECT coalesce(max(id), 0) FROM evictions").fetchone()
        if evictions != self._evictions:
            self._evictions, self._seen, self._anchors = evictions, 0, {}
        rows = self._db.execute(
            "SELECT id, sha256, anchor, chars, tag FROM texts "
            "WHERE id > ? AND engine = ? ORDER BY id",
            (self._seen, self._engine),
        )
        for self._seen, sha256, anchor, chars, tag in rows:
            self._anchors.setdefault(anchor, {}).setdefault(chars, {})[sha256] = tag


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
