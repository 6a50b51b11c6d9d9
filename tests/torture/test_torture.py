"""The long forms: ``make torture DURATION=seconds``. Each gets that time at most, and says counts.

Their short forms run with all other tests, from tests/store/test_short_torture.py.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from a3_engine import A3Engine
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer
from tests.torture import archives, indexes, inputs, kills, remotes
from tests.torture.crash import crash
from tests.torture.crowd import crowd
from tests.torture.endurance import endure
from tests.torture.fuzz import fuzz_payloads, fuzz_store
from tests.torture.hour import hour
from tests.torture.ingestion import ingest

DURATION = float(os.environ.get("DURATION", "600"))
pytestmark = pytest.mark.torture


@pytest.fixture
def until() -> float:
    return time.monotonic() + DURATION


@pytest.fixture
def say(capsys):
    def say(name: str, figures) -> None:
        with capsys.disabled():
            print(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))

    return say


def test_fuzz(until, say):
    """More than a million mutations, most of payloads and the rest through a store."""
    counts = fuzz_payloads(900_000, until)
    memory = Path("/dev/shm")  # a sync costs nothing there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        say("fuzz", counts + fuzz_store(Path(folder), 120_000, until))


def test_crash(tmp_path, until, say):
    say("crash", crash(tmp_path, 300, until))


def test_crowd(tmp_path, say):
    say("crowd", crowd(tmp_path / "cache", DURATION))


def test_endurance(tmp_path, until, say):
    say("endurance", endure(tmp_path, 10_000, until))


def test_ingestion(tmp_path, until, say):
    say("ingestion", ingest(tmp_path, 20_000, until))


def test_the_hour(tmp_path, say):
    say("hour", hour(tmp_path, DURATION, print))


def test_the_index_locked_for_half_a_minute(tmp_path: Path, say):
    """Reads go on meanwhile; a write fails after its wait, and works when the lock is gone."""
    from tests.store.troubles import locked_index

    say("lock", locked_index(tmp_path, seconds=30.0, patience=20.0))


def test_hostile_inputs(tmp_path, say):
    """To both adapters; those to the engine are in tests/engine/test_hostile.py."""
    engine = A3Engine.from_pretrained(
        tiny_model("llama"), tiny_tokenizer(), cache_dir=tmp_path, stand_in=STAND_IN
    )
    count, foreign = inputs.attack(engine)
    engine.close()
    say("inputs", {"calls": count, "foreign": len(foreign)})
    assert foreign == []


def test_hostile_archives(tmp_path, say):
    (tmp_path / "store").mkdir()
    say("archives", {"archives": archives.attack(tmp_path / "store")})


@pytest.mark.usefixtures("socket_enabled")
def test_lying_stores(tmp_path, say):
    say("remotes", {"stores": remotes.attack(tmp_path)})


def test_damaged_indexes(tmp_path, say):
    count, hits = indexes.attack(tmp_path)
    say("indexes", {"damages": count, "hits after them": hits})


def test_killed_ingestion_and_eviction(tmp_path, until, say):
    say("kills", kills.kill_ingestion(tmp_path, 500, until))


def test_killed_unpacking(tmp_path, until, say):
    say("unpacking", kills.kill_unpacking(tmp_path, 100, until))
