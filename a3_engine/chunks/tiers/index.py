"""diskcache's table, read and written by what diskcache itself does not offer; and some beside it.

``Tags`` holds all tags of a chunk, ``Texts`` how its texts are found again. Both outlive the chunk
where it goes for want of room: it comes back when a prompt holds it. Reads never wait for a writer:
they take no lock, and marking what was used gives up soon. The order of use follows the clock, but
never goes back when the clock does.

The file bears a seal of its own form. An index of another form, made by another version or altered
by somebody, is as good as a damaged one, and rows that we cannot have written are not seen.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diskcache.core import MODE_BINARY

from a3_engine.chunks.known import About, Known
from a3_engine.chunks.tiers.database import Database
from a3_engine.chunks.tiers.safe_disk import SafeDisk

# A row that `put` can have written; the rest is not looked at, and `sweep_rows` removes it.
OURS = f"raw = 1 AND typeof(key) = 'text' AND mode = {MODE_BINARY} AND value IS NULL"
TIMES, LATEST = ("store_time", "access_time"), 1e11  # seconds; about the year 5000
LATER = "max(:now, (SELECT coalesce(max(access_time), 0) + 1e-6 FROM Cache))"
MOST_ID = 2**60
MARK_S = 0.05  # at the end of a request, which does not wait longer for this
SCHEMA = """
CREATE INDEX IF NOT EXISTS Cache_access_time ON Cache (access_time);
CREATE TABLE IF NOT EXISTS Tags (key TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (key, tag))
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Tags_tag ON Tags (tag);
CREATE TABLE IF NOT EXISTS Texts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, engine TEXT NOT NULL, sha256 TEXT NOT NULL,
    chars INTEGER NOT NULL, head TEXT NOT NULL, rolling INTEGER NOT NULL, key TEXT NOT NULL,
    UNIQUE (engine, sha256)
);
CREATE INDEX IF NOT EXISTS Texts_key ON Texts (key);
CREATE TABLE IF NOT EXISTS Evictions (id INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE TABLE IF NOT EXISTS Removals (id INTEGER PRIMARY KEY AUTOINCREMENT, store TEXT);
INSERT INTO Removals (store) SELECT lower(hex(randomblob(16)))
    WHERE NOT EXISTS (SELECT 1 FROM Removals);
"""
# What the triggers count is what there is, and no number has come to its end.
COUNTED = f"""
SELECT (SELECT value FROM Settings WHERE key = 'size') = (SELECT coalesce(sum(size), 0) FROM Cache)
    AND (SELECT count(*) FROM Removals) = 1
    AND NOT EXISTS (SELECT 1 FROM Removals WHERE id >= {MOST_ID} OR store IS NULL)
    AND NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE coalesce(seq, {MOST_ID}) >= {MOST_ID})
"""
OURS_TAGGED = "typeof(key) = 'text' AND typeof(tag) = 'text'"


class Row(NamedTuple):
    """One entry of the index; times are seconds since the epoch."""

    key: str
    filename: Any
    nbytes: int
    stored: float
    used: float
    tags: tuple[str, ...]


class Note(NamedTuple):
    """What is known of a chunk beside its KV: whose it is, and of which text and tag."""

    engine: str
    key: str
    about: About


class Entry(NamedTuple):
    """What a row is made of; ``stored`` is in seconds since the epoch."""

    note: Note
    filename: str
    nbytes: int
    stored: float


class Index:
    """Rows of one store's ``cache.db``."""

    def __init__(self, database: Database, disk: SafeDisk) -> None:
        self._database, self._disk = database, disk

    def sound(self) -> bool:
        """Whether it has the form in which this version makes it, and numbers that can be."""
        (sealed,) = self._database.execute("PRAGMA user_version").fetchone()
        if sealed != self._form():
            return False
        (counted,) = self._database.execute(COUNTED).fetchone()
        return bool(counted)

    def _form(self) -> int:
        """A digest of all that is defined in the file, and of what this version defines."""
        query = (
            "SELECT type, name, tbl_name, sql FROM sqlite_master "
            "WHERE name NOT LIKE 'sqlite_stat%' ORDER BY type, name"
        )
        defined = self._database.execute(query).fetchall()
        return zlib.crc32(f"{SCHEMA} {defined}".encode()) >> 1  # a signed number of 32 bits

    def make_tables(self) -> None:
        """The tables beside diskcache's own."""
        self._database.executescript(SCHEMA)

    def seal(self) -> None:
        """From now on it counts as an index; one that was left half made does not."""
        self._database.execute(f"PRAGMA user_version = {self._form()}")

    def tags(self) -> list[tuple[str, str]]:
        """Every key with a tag that it has."""
        query = f"SELECT key, tag FROM Tags WHERE {OURS_TAGGED} ORDER BY tag"
        return [(key, tag) for key, tag in self._database.execute(query)]

    # Entries

    def find(self, key: str) -> Any:
        """The name of an entry's file; None where there is no entry."""
        query = f"SELECT filename FROM Cache WHERE key = ? AND {OURS}"
        (filename,) = self._database.execute(query, (key,)).fetchone() or (None,)
        return filename

    def contains(self, key: str, since: float = 0.0) -> bool:
        query = f"SELECT 1 FROM Cache WHERE key = ? AND access_time >= ? AND {OURS}"
        return self._database.execute(query, (key, since)).fetchone() is not None

    def expired(self, tags: str, before: float) -> set[str]:
        """Keys of entries last used before a time that have a tag which begins so."""
        query = (
            "SELECT Cache.key FROM Tags JOIN Cache ON Cache.key = Tags.key AND Cache.raw = 1 "
            "WHERE Tags.tag >= ?1 AND Tags.tag < ?1 || char(1114111) AND access_time < ?2"
        )
        return {key for (key,) in self._database.execute(query, (tags, before))}

    def forget_tags(self, tags: str) -> None:
        """Forget the tags that begin so, of chunks that are not there."""
        with self._database.writing() as db:
            db.execute(
                "DELETE FROM Tags WHERE tag >= ?1 AND tag < ?1 || char(1114111) "
                "AND key NOT IN (SELECT key FROM Cache)",
                (tags,),
            )

    def rows(self) -> Iterator[Row]:
        """All entries, the least recently used first."""
        times = (f"min(max(CAST({name} AS REAL), 0), {LATEST})" for name in TIMES)
        query = (
            f"SELECT key, filename, max(CAST(size AS INTEGER), 0), {', '.join(times)} "
            f"FROM Cache WHERE {OURS}"
        )
        tags: dict[str, tuple[str, ...]] = {}
        for key, tag in self.tags():
            tags[key] = (*tags.get(key, ()), tag)
        for row in self._database.execute(f"{query} ORDER BY access_time").fetchall():
            key, filename, nbytes, stored, used = row
            yield Row(key, filename, nbytes or 0, stored or 0.0, used or 0.0, tags.get(key, ()))

    def insert(self, entries: Iterable[Entry]) -> None:
        """Rows for files that are there, in place of their keys' earlier ones; the last used."""
        before: list[str] = []
        with self._database.writing() as db:
            for note, *rest in entries:
                values = dict(zip(("key", "name", "size", "now"), (note.key, *rest), strict=True))
                # Not by a REPLACE, which diskcache's triggers that count bytes do not see.
                query = "DELETE FROM Cache WHERE key = :key AND raw = 1 RETURNING filename"
                before += [name for (name,) in db.execute(query, values).fetchall()]
                db.execute(
                    "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename) "
                    f"VALUES (:key, 1, :now, {LATER}, :size, {MODE_BINARY}, :name)",
                    values,
                )
                self._note(db, [note])
        for name in before:
            self._disk.remove(name)

    def file_names(self) -> set[str]:
        """Names of the files that have a row."""
        return {
            name for (name,) in self._database.execute(f"SELECT filename FROM Cache WHERE {OURS}")
        }

    def touch(self, keys: Sequence[str]) -> None:
        """Mark entries as the last used, unless somebody else keeps writing."""
        marks = [{"now": time.time(), "key": key} for key in keys]
        with contextlib.suppress(sqlite3.OperationalError):
            # A mark may be lost in a power cut.
            self._database.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._database.writing(MARK_S) as db:
                    db.executemany(
                        f"UPDATE Cache SET access_time = {LATER} WHERE key = :key AND {OURS}", marks
                    )
            finally:
                self._database.execute("PRAGMA synchronous = FULL")

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
        rows = self._database.execute(query, values).fetchall()
        keys = self._unlink(rows)
        self._delete(where, values)
        return keys

    def remove_keys(self, keys: Iterable[str]) -> set[str]:
        gone: set[str] = set()
        for key in keys:
            gone |= self.remove("key = ?", (key,))
        return gone

    def make_room(self, limit: int) -> set[str]:
        """Remove the least recently used entries, no more than it takes for the store to fit."""
        excess = self.volume() - limit
        if excess <= 0:
            return set()
        oldest = []
        query = "SELECT rowid, max(CAST(size AS INTEGER), 0) FROM Cache ORDER BY access_time"
        for rowid, nbytes in self._database.execute(query):
            oldest.append(rowid)
            excess -= nbytes
            if excess <= 0:
                break
        return self.remove(f"rowid IN ({','.join(map(str, oldest))})", ())

    def sweep_rows(self) -> int:
        """Remove the rows that `put` cannot have written; their files are orphans then."""
        with self._database.writing() as db:
            return db.execute(f"DELETE FROM Cache WHERE NOT coalesce({OURS}, 0)").rowcount

    def recount(self) -> None:
        """Correct the counters of entries and bytes."""
        with self._database.writing() as db:
            for name, query in (("count", "count(*)"), ("size", "coalesce(sum(size), 0)")):
                db.execute(
                    f"UPDATE Settings SET value = (SELECT {query} FROM Cache) WHERE key = ?",
                    (name,),
                )

    def count(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM Cache").fetchone()[0])

    def volume(self) -> int:
        """Bytes of the payloads and of the index itself."""
        query = "SELECT coalesce(sum(CAST(value AS INTEGER)), 0) FROM Settings WHERE key = 'size'"
        (payloads,) = self._database.execute(query).fetchone()
        (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        (page,) = self._database.execute("PRAGMA page_size").fetchone()
        return payloads + pages * page

    def state(self) -> str:
        """Another one for every store, and whenever something was removed."""
        return str(self._database.execute("SELECT store, id FROM Removals").fetchall())

    def problems(self) -> list[str]:
        """What sqlite itself finds wrong."""
        found = [str(message) for (message,) in self._database.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else [f"index: {message}" for message in found]

    # Tags and texts

    def note(self, notes: Iterable[Note]) -> None:
        """Remember texts and tags of chunks, stored or not; nothing is written for known ones."""
        new = [note for note in notes if not self._noted(note)]
        if new:
            with self._database.writing() as db:
                self._note(db, new)

    def tagged(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a tag."""
        query = "SELECT 1 FROM Tags WHERE key = ?"
        return {key for key in keys if self._database.execute(query, (key,)).fetchone()}

    def take_tag(self, tag: str) -> set[str]:
        """Forget a tag, and the texts of chunks that have no other; returns those chunks' keys."""
        with self._database.writing() as db:
            taken = db.execute("DELETE FROM Tags WHERE tag = ? RETURNING key", (tag,)).fetchall()
            keys = {key for (key,) in taken}
            keys -= self.tagged(keys)
            db.executemany("DELETE FROM Texts WHERE key = ?", [(key,) for key in keys])
            if keys:
                db.execute("INSERT INTO Evictions DEFAULT VALUES")
        return keys

    def wipe(self) -> None:
        """Leave nothing in the log of what was deleted, unless somebody reads there now."""
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA busy_timeout = 0")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def evictions(self) -> int:
        """Grows whenever texts are forgotten."""
        query = "SELECT coalesce(max(id), 0) FROM Evictions"
        return int(self._database.execute(query).fetchone()[0])

    def texts(self, engine: str, after: int) -> tuple[int, list[Known]]:
        """An engine's texts that came after a number, and the number of the last."""
        (last,) = self._database.execute("SELECT coalesce(max(id), 0) FROM Texts").fetchone()
        rows = self._database.execute(
            # The plus keeps sqlite from going through all of the engine's texts by their index.
            "SELECT sha256, chars, head, rolling FROM Texts "
            "WHERE id > ? AND id <= ? AND +engine = ?",
            (after, last, engine),
        )
        return last, [known for row in rows if (known := Known.read(row)) is not None]

    def text_rows(self, tag: str | None = None) -> list[list[Any]]:
        """Every engine's ``[engine, key, [sha256, chars, head, rolling]]``; of one tag if given."""
        query = (
            "SELECT engine, key, sha256, chars, head, rolling FROM Texts "
            "WHERE typeof(engine) = 'text' AND typeof(key) = 'text' "
            "AND (?1 IS NULL OR key IN (SELECT key FROM Tags WHERE tag = ?1))"
        )
        rows = self._database.execute(query, (tag,))
        return [[row[0], row[1], list(row[2:])] for row in rows if Known.read(row[2:]) is not None]

    def _noted(self, note: Note) -> bool:
        tagged = "SELECT 1 FROM Tags WHERE key = ? AND tag = ?"
        known = "SELECT 1 FROM Texts WHERE engine = ? AND sha256 = ?"
        text, tag = note.about
        return (
            tag is None or self._database.execute(tagged, (note.key, tag)).fetchone() is not None
        ) and (
            text is None
            or self._database.execute(known, (note.engine, text.sha256)).fetchone() is not None
        )

    @staticmethod
    def _note(db: Database, notes: Iterable[Note]) -> None:
        for engine, key, (known, tag) in notes:
            if tag is not None:
                db.execute("INSERT OR IGNORE INTO Tags VALUES (?, ?)", (key, tag))
            if known is not None:
                db.execute(
                    "INSERT OR IGNORE INTO Texts (engine, sha256, chars, head, rolling, key) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (engine, *known, key),
                )

    def _delete(self, where: str, values: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        with self._database.writing() as db:
            query = f"DELETE FROM Cache WHERE ({where}) RETURNING key, filename"
            removed = db.execute(query, values).fetchall()
            if removed:
                db.execute("UPDATE Removals SET id = id + 1")
            return removed

    def _unlink(self, rows: Iterable[tuple[Any, Any]]) -> set[str]:
        keys = set()
        for key, filename in rows:
            self._disk.remove(filename)
            if isinstance(key, str):
                keys.add(key)
        return keys


def remove_old_catalogue(folder: Path) -> None:
    """The file in which earlier versions kept texts and tags, readable to all."""
    path = folder / "texts.sqlite3"
    if path.is_symlink() or not path.is_file():
        return
    with contextlib.suppress(sqlite3.Error, OSError):
        # Its owner may have a file of that name, which is another.
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            found = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'chunk_texts'").fetchone()
        if found is not None:
            for end in ("", "-wal", "-shm"):
                path.with_name(path.name + end).unlink(missing_ok=True)
