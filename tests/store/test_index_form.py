"""An index of another form is a damaged one: made anew from the chunks, and no answer waits."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from a3_engine import Chunk, StoreError
from a3_engine.chunks.known import About
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.cli import main
from tests.store.stored import header, holds, payload
from tests.store.troubles import small_disk

TABLES = ("Cache", "Settings", "Tags", "Texts", "Evictions", "Removals")
LAMP = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."
SHORE = "The northern shore is steep, and few boats land there before the ice is broken."
ASK = "Who sleeps?"
CHUNKS = 3


def columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def drop(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"DROP TABLE {table}")


def rename_table(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"ALTER TABLE {table} RENAME TO {table}2")


def rename_column(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"ALTER TABLE {table} RENAME COLUMN {columns(db, table)[-1]} TO another")


def add_column(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"ALTER TABLE {table} ADD COLUMN more TEXT NOT NULL DEFAULT 'x'")


def another_type(db: sqlite3.Connection, table: str) -> None:
    names = columns(db, table)
    db.execute(f"CREATE TABLE other ({', '.join(f'{name} FLOAT' for name in names)})")
    db.execute(f"INSERT INTO other SELECT {', '.join(names)} FROM {table}")
    drop(db, table)
    db.execute(f"ALTER TABLE other RENAME TO {table}")


def without_a_column(db: sqlite3.Connection, table: str) -> None:
    """As an earlier version made it, say."""
    kept = ", ".join(columns(db, table)[:-1]) or "1 AS one"
    db.execute(f"CREATE TABLE other AS SELECT {kept} FROM {table}")
    drop(db, table)
    db.execute(f"ALTER TABLE other RENAME TO {table}")


def a_view_in_its_place(db: sqlite3.Connection, table: str) -> None:
    rename_table(db, table)
    db.execute(f"CREATE VIEW {table} AS SELECT * FROM {table}2")


def a_virtual_table_in_its_place(db: sqlite3.Connection, table: str) -> None:
    names = ", ".join(f"c_{name}" for name in columns(db, table))
    drop(db, table)
    db.execute(f"CREATE VIRTUAL TABLE {table} USING fts5({names})")


def a_trigger_that_refuses(db: sqlite3.Connection, table: str) -> None:
    db.execute(
        f"CREATE TRIGGER refuse BEFORE INSERT ON {table} BEGIN SELECT raise(ABORT, 'no'); END"
    )


def no_rows(db: sqlite3.Connection, table: str) -> None:
    db.execute(f"DELETE FROM {table}")


def without_its_indices(db: sqlite3.Connection, table: str) -> None:
    query = "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql NOT NULL"
    names = db.execute(query, (table,)).fetchall()
    for (name,) in names:
        db.execute(f"DROP INDEX {name}")
    if not names:
        db.execute(f"CREATE INDEX one ON {table} ({columns(db, table)[0]})")


def numbers_at_their_end(db: sqlite3.Connection, table: str) -> None:
    name = {"Settings": "value", "Cache": "size"}.get(table, columns(db, table)[0])
    if table in ("Tags", "Settings", "Cache"):
        db.execute(f"UPDATE OR IGNORE {table} SET {name} = ?", (2**63 - 1,))
    elif table == "Texts":
        db.execute("UPDATE Texts SET id = ? WHERE id = 1", (2**63 - 1,))
    else:
        db.execute(f"UPDATE {table} SET id = ?", (2**63 - 1,))
        db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (2**63 - 1, table))


ALTERED = [
    drop,
    rename_table,
    rename_column,
    add_column,
    another_type,
    without_a_column,
    a_view_in_its_place,
    a_virtual_table_in_its_place,
    a_trigger_that_refuses,
    without_its_indices,
    no_rows,
    numbers_at_their_end,
]


def alter(index: Path, how, table: str) -> None:
    db = sqlite3.connect(index, isolation_level=None)
    db.execute("PRAGMA legacy_alter_table = ON")
    how(db, table)
    db.close()


# Somebody's own removals are no damage.
REMOVED = [(no_rows, "Cache"), (no_rows, "Tags"), (numbers_at_their_end, "Tags")]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("how", ALTERED)
def test_whatever_form_the_tables_have_nothing_is_lost(memory_path, how, table):
    """Also where another process alters them while the store is open."""
    about = About(None, "doc").to_json()
    store = DiskStore(memory_path / "chunks")
    for seed in range(CHUNKS):
        store.put(replace(payload(seed), about=about), "doc")
    alter(memory_path / "chunks" / "cache.db", how, table)
    for _ in range(2):  # what meets the damage says so, once, or is a miss
        for read in (lambda: store.texts("an engine", 0), store.stats, store.state):
            with contextlib.suppress(StoreError, sqlite3.Error):
                read()
        for seed in range(CHUNKS):
            holds(store, seed)
    store.close()
    again = DiskStore(memory_path / "chunks")
    if (how, table) not in REMOVED:
        assert all(holds(again, seed) for seed in range(CHUNKS))
        assert len(again.evict("doc")) == CHUNKS
    again.put(payload(CHUNKS), "another")
    assert holds(again, CHUNKS)
    assert again.verify() == []
    assert again.state() != DiskStore(memory_path / "other").state()
    assert again.evict("another") == {header(CHUNKS).key}
    again.close()


def test_an_answer_never_waits_for_the_tables(tiny_engine, tmp_path):
    """One engine goes on through all of it, and finds the texts again."""
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "doc"), Chunk(SHORE, "doc")], progress=False)
    expected = engine.generate(f"{LAMP} {SHORE} {ASK}", max_new_tokens=3).text
    for place, how in enumerate(ALTERED[:-2:3]):
        alter(tmp_path / "cache" / "chunks" / "cache.db", how, TABLES[place % len(TABLES)])
        for _ in range(2):
            answer = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=3)
        assert answer.report.hits == 2
        engine.close()
        again = engine.generate(f"{LAMP} {SHORE} {ASK}", max_new_tokens=3)
        assert (again.text, again.report.hits) == (expected, 2)
    assert engine.evict("doc") == 2


def test_rows_that_we_cannot_have_written_are_not_seen(tiny_engine, tmp_path, capsys):
    """Numbers and bytes where texts belong, texts that are none, and times that cannot be."""
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "doc")], progress=False)
    odd = [None, 5, 2**62, -1.5, float("inf"), b"\xff\xfe", "text", "", "x" * 32]
    with sqlite3.connect(tmp_path / "cache" / "chunks" / "cache.db") as db:
        db.execute(
            "INSERT INTO Texts SELECT 900, engine, CAST(x'ff' AS TEXT), chars, "
            "CAST(x'fffe' AS TEXT), rolling, key FROM Texts WHERE id = 1"
        )
        for place, value in enumerate(odd):
            for column in ("engine", "sha256", "chars", "head", "rolling", "key"):
                row = ["e", f"{place}{column}", 40, "x" * 32, 5, "k"]
                row[["engine", "sha256", "chars", "head", "rolling", "key"].index(column)] = value
                names = "engine, sha256, chars, head, rolling, key"
                db.execute(f"INSERT OR IGNORE INTO Texts ({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("INSERT OR IGNORE INTO Tags VALUES (?, ?)", (value, b"\xff"))
            db.execute("INSERT OR IGNORE INTO Tags VALUES ('key', ?)", (value,))
            db.execute("UPDATE Cache SET access_time = ? WHERE rowid = 1", (value,))
            db.execute("UPDATE Cache SET store_time = ? WHERE rowid = 2", (value,))
        db.execute("UPDATE Texts SET engine = (SELECT engine FROM Texts WHERE id = 1)")
    db.close()
    assert engine.generate(f"{LAMP} {SHORE} {ASK}", max_new_tokens=2).report.hits == 1
    folder = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", "ls", *folder]) == main(["cache", "ls", "--json", *folder]) == 0
    assert main(["cache", "export", str(tmp_path / "x.tar"), *folder]) == 0
    assert main(["cache", "import", str(tmp_path / "x.tar"), "--cache-dir", str(tmp_path)]) == 0
    assert engine.verify() == []


def test_a_rebuild_that_is_killed_loses_nothing(memory_path, monkeypatch):
    """An index that is half made is no index: its missing rows make no file an orphan."""
    store = DiskStore(memory_path)
    for seed in range(CHUNKS):
        store.put(payload(seed))
    store.close()
    (memory_path / "cache.db").unlink()

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for step in ("insert", "note", "seal"):
        with monkeypatch.context() as patched:
            patched.setattr(f"a3_engine.chunks.tiers.index.Index.{step}", killed)
            with pytest.raises(Killed):
                DiskStore(memory_path)
    again = DiskStore(memory_path)
    assert all(holds(again, seed) for seed in range(CHUNKS))
    again.close()


def test_tags_that_only_the_index_has_outlive_its_form(memory_path):
    """A later document's, whose chunk was there already."""
    store = DiskStore(memory_path)
    store.put(replace(payload(1), about=About(None, "one").to_json()), "one")
    store.retag({header(1).key: "two"})
    store.close()
    alter(memory_path / "cache.db", rename_column, "Texts")
    again = DiskStore(memory_path)
    assert again.evict("one") == set()
    assert (memory_path / "cache.db.damaged").exists() is False  # it may hold the tag's letters
    assert again.evict("two") == {header(1).key}
    again.close()


@pytest.mark.parametrize("how", [drop, rename_column, a_view_in_its_place])
def test_a_damaged_index_that_nobody_may_mend_serves_all_the_same(tiny_engine, tmp_path, how):
    """As that of a container image which an earlier version filled."""
    with small_disk(tmp_path / "small", 2**21) as disk:
        engine = tiny_engine(cache_dir=disk)
        engine.precompute([LAMP], progress=False)
        answer = engine.generate(f"{LAMP} {ASK}", max_new_tokens=3)
        engine.close()
        alter(disk / "chunks" / "cache.db", how, "Texts")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            before = sorted(disk.rglob("*"))
            again = engine.generate(f"{LAMP} {ASK}", max_new_tokens=3)
            assert (again.text, again.report.hits) == (answer.text, 1)
            assert sorted(disk.rglob("*")) == before
            assert main(["cache", "stats", "--cache-dir", str(disk)]) == 1
            with pytest.raises(StoreError):
                engine.evict("doc")
        finally:
            engine.close()
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def test_what_an_earlier_version_left_beside_the_folder_is_removed(tmp_path):
    """The texts and tags that it kept there for all to read; another file of that name stays."""
    for names, stays in ((("chunk_texts", "evictions"), False), (("notes",), True)):
        folder = tmp_path / names[0]
        folder.mkdir()
        with sqlite3.connect(folder / "texts.sqlite3") as db:
            for name in names:
                db.execute(f"CREATE TABLE {name} (id INTEGER)")
        db.close()
        DiskStore(folder / "chunks").close()
        assert (folder / "texts.sqlite3").exists() is stays
