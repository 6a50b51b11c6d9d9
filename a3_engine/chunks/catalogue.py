"""The texts of stored chunks, to find them again inside a finished prompt.

A framework may hand over nothing but one long string. Every text of a stored chunk that stands in
it, to the letter, can be served from the cache. A candidate begins like a known text, ends like a
known text and is as long as one that begins so, each by `ANCHOR` characters; a hash of the whole
text decides. Heads alone would not do: texts with metadata often begin alike by the thousand. Only
hashes, heads and tails are kept on disk.
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
FEW = 8  # lengths that are tried one by one

SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk_texts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    engine TEXT NOT NULL, sha256 TEXT NOT NULL, chars INTEGER NOT NULL, head TEXT NOT NULL,
    tail TEXT NOT NULL, tag TEXT, UNIQUE (engine, sha256)
);
CREATE INDEX IF NOT EXISTS chunk_texts_by_tag ON chunk_texts (tag);
CREATE TABLE IF NOT EXISTS evictions (id INTEGER PRIMARY KEY AUTOINCREMENT);
"""
INSERT = (
    "INSERT INTO chunk_texts (engine, sha256, chars, head, tail, tag) VALUES (?, ?, ?, ?, ?, ?) "
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
        self._lengths: dict[str, set[int]] = {}  # by head
        self._tails: set[str] = set()
        self._tags: dict[str, str | None] = {}  # by hash

    def add(self, texts: Iterable[tuple[str, str | None]]) -> None:
        """Remember ``(text, tag)`` pairs, but for texts shorter than `ANCHOR` characters."""
        rows = [
            (self._engine, _sha256(text), len(text), text[:ANCHOR], text[-ANCHOR:], tag)
            for text, tag in texts
            if len(text) >= ANCHOR
        ]
        with self._writing():
            self._db.executemany(INSERT, rows)

    def forget(self, tag: str) -> None:
        """Forget the texts with this tag."""
        with self._writing():
            if self._db.execute("DELETE FROM chunk_texts WHERE tag = ?", (tag,)).rowcount:
                self._db.execute("INSERT INTO evictions DEFAULT VALUES")

    def rows(self, tag: str | None = None) -> list[list[Any]]:
        """Every engine's ``[engine, sha256, chars, head, tail, tag]``, of one tag where given."""
        query = (
            "SELECT engine, sha256, chars, head, tail, tag FROM chunk_texts "
            "WHERE ? IS NULL OR tag = ?"
        )
        with self._lock:
            return [list(row) for row in self._db.execute(query, (tag, tag))]

    def add_rows(self, rows: Iterable[Any]) -> None:
        """Take over what `rows` gave elsewhere; what cannot be such a row is left out."""
        kinds = (str, str, int, str, str, str | None)
        sound = [
            row
            for row in rows
            if isinstance(row, list)
            and len(row) == len(kinds)
            and all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True))
            and len(row[3]) == len(row[4]) == ANCHOR <= row[2]
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
            windows = [text[at : at + ANCHOR] for at in range(len(text) - ANCHOR + 1)]
            heads = self._lengths.keys() & windows  # faster than asking for them one by one
            starts = [(at, self._lengths[w]) for at, w in enumerate(windows) if w in heads]
            # Where thousands begin alike, only the lengths that end at a known tail are tried.
            many = any(len(lengths) > FEW for _, lengths in starts)
            stops = [
                at + ANCHOR for at, window in enumerate(windows) if many and window in self._tails
            ]
            matches: list[Match] = []
            behind = 0
            for start, lengths in starts:
                if start >= behind and (match := self._longest(text, start, lengths, stops)):
                    matches.append(match)
                    behind = match.stop
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

    def of(self, engine: str) -> Catalogue:
        """The same for another engine."""
        return Catalogue(self._path, engine)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _longest(self, text: str, start: int, lengths: set[int], stops: list[int]) -> Match | None:
        if len(lengths) > FEW:
            candidates = [stop for stop in stops if stop - start in lengths]
        else:
            candidates = [start + chars for chars in lengths if start + chars <= len(text)]
        for stop in sorted(candidates, reverse=True):
            if (known := _sha256(text[start:stop])) in self._tags:
                return Match(start, stop, self._tags[known])
        return None

    def _refresh(self) -> None:
        """Read what this or another process has added since; all of it after a removal."""
        (evictions,) = self._db.execute("SELECT coalesce(max(id), 0) FROM evictions").fetchone()
        if evictions != self._evictions:
            self._evictions, self._seen = evictions, 0
            self._lengths, self._tails, self._tags = {}, set(), {}
        (last,) = self._db.execute("SELECT coalesce(max(id), 0) FROM chunk_texts").fetchone()
        rows = self._db.execute(
            # The plus keeps sqlite from going through all of the engine's texts by their index.
            "SELECT sha256, chars, head, tail, tag FROM chunk_texts "
            "WHERE id > ? AND id <= ? AND +engine = ?",
            (self._seen, last, self._engine),
        )
        for sha256, chars, head, tail, tag in rows:
            self._lengths.setdefault(head, set()).add(chars)
            self._tails.add(tail)
            self._tags[sha256] = tag
        self._seen = last


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
