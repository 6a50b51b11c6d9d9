"""Short forms of tests/torture, bounded in time."""

from __future__ import annotations

import time

import pytest

from tests.torture import archives, indexes, inputs, kills, remotes
from tests.torture.crash import crash
from tests.torture.crowd import crowd
from tests.torture.endurance import endure
from tests.torture.fuzz import fuzz_payloads, fuzz_store


def test_mutated_payloads_are_misses():
    counts = fuzz_payloads(8_000, time.monotonic() + 10)
    assert counts["payload misses"] > 0.9 * counts["payloads"] > 100


def test_mutated_files_and_rows_are_misses(tmp_path):
    counts = fuzz_store(tmp_path, 600, time.monotonic() + 8)
    assert counts["store misses"] > 20


def test_killed_writers_lose_nothing(tmp_path):
    counts = crash(tmp_path, 25, time.monotonic() + 8)
    assert counts["reported"] > 10
    assert counts["kills"] > 5


def test_threads_and_processes_share_a_folder(tmp_path):
    counts = crowd(tmp_path / "cache", 4)
    assert min(counts[kind] for kind in ("requests", "computed", "puts", "hits")) > 0


def test_churn_stays_bounded(tmp_path):
    figures = endure(tmp_path, 150, time.monotonic() + 15)
    assert min(figures["hits"], figures["misses"]) > 0


def test_hostile_inputs_to_the_adapters(tiny_engine):
    count, foreign = inputs.attack(tiny_engine(), step=29)
    assert count > 50
    assert foreign == []


def test_archives_that_lie(memory_path):
    (memory_path / "store").mkdir()
    assert archives.attack(memory_path / "store") > 60


@pytest.mark.usefixtures("socket_enabled")
def test_stores_that_lie(memory_path):
    assert remotes.attack(memory_path, step=13) > 3


def test_damaged_indexes_stop_no_answer(memory_path):
    count, hits = indexes.attack(memory_path, step=29)
    assert count > 2
    assert hits > count


def test_killed_ingestion_loses_nothing(memory_path):
    counts = kills.kill_ingestion(memory_path, 20, time.monotonic() + 5)
    assert min(counts["kills"], counts["reported"]) > 2
