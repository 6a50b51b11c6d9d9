"""Damaged indexes, by kind and place: none stops an answer, or changes it."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from a3_engine import A3Engine, Chunk
from tests.store.test_index_form import ALTERED, TABLES, alter
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer

ASK = "Which lamp burns?"
TEXTS = [f"Document {n} says that lamp {n * 7} burns through night {n * 13}." for n in range(3)]
PAGE = 4096


def _overwrite(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def _rows(path: Path, statement: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(statement)
    db.close()


def damages() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """What is done, to which file of the folder, and how."""
    rng = random.Random(0)
    for end in ("", "-wal", "-shm"):
        file = f"cache.db{end}"
        for place in range(6):
            content = rng.randbytes(PAGE)
            yield (
                f"random page {place}",
                file,
                partial(_overwrite, start=place * PAGE, content=content),
            )
        if end != "-shm":  # cutting what a process has mapped ends it, as docs/store.md says
            for size in (0, 1, 100, PAGE, 3 * PAGE + 17):
                yield f"cut to {size}", file, partial(os.truncate, length=size)
            yield "text", file, lambda path: path.write_text("no database " * 999)
        yield "removed", file, lambda path: path.unlink()
        yield "a folder", file, partial(_replace, make=Path.mkdir)
    for file in ("cache.db", "writers.lock"):
        yield "a pipe", file, partial(_replace, make=os.mkfifo)
    yield "a folder", "writers.lock", partial(_replace, make=Path.mkdir)
    yield "removed", "writers.lock", Path.unlink
    for table in TABLES:
        how = ALTERED[TABLES.index(table) % len(ALTERED)]
        yield f"{how.__name__} {table}", "cache.db", partial(alter, how=how, table=table)
        statement = f"DELETE FROM {table}"
        yield statement, "cache.db", partial(_rows, statement=statement)
    for name in ("key", "filename", "raw", "size", "access_time", "mode"):
        odd = "CASE rowid % 2 WHEN 0 THEN CAST(x'ff00' || rowid AS BLOB) ELSE -rowid END"
        statement = f"UPDATE Cache SET {name} = {odd}"
        yield statement, "cache.db", partial(_rows, statement=f"{statement} WHERE rowid > 1")


def attack(
    folder: Path, step: int = 1, say: Callable[[str], object] = lambda line: None
) -> tuple[int, int]:
    """Damage the index in use, or between two starts; returns how often, and hits after it."""
    engine = A3Engine.from_pretrained(
        tiny_model("llama"), tiny_tokenizer(), cache_dir=folder / "cache", stand_in=STAND_IN
    )
    plain = f"{TEXTS[0]} {TEXTS[1]} {ASK}"

    def answers() -> tuple[str, str]:
        given = engine.generate(ASK, chunks=TEXTS[:2], max_new_tokens=3)
        return given.text, engine.generate(plain, ratio=1.0, max_new_tokens=3).text

    expected, count, hits = answers(), 0, 0
    cases = list(itertools.product(damages(), (True, False)))
    for (name, file, damage), closed in cases[::step]:
        engine.precompute([Chunk(text, "doc") for text in TEXTS], progress=False)
        path = folder / "cache" / "chunks" / file
        if closed:
            engine.close()
        if not path.exists():  # the log, when nobody has it open
            continue
        damage(path)
        count += 1
        where = f"{name} of {file}, {'closed' if closed else 'in use'}"
        for _ in range(2):
            assert answers() == expected, where
        engine.close()
        again = engine.generate(plain, ratio=1.0, max_new_tokens=3)
        assert again.text == expected[1], where
        hits += again.report.hits
        say(f"{where}: {again.report.hits} hits")
        engine.verify()
        assert engine.verify() == [], where
    engine.close()
    return count, hits
