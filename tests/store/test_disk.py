"""The chunk store: what it returns is what was put, or nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from a3_engine.chunks.fingerprint import FORMAT_VERSION
from a3_engine.chunks.payload import Payload
from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import chunk, header, holds, payload, payloads

SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_comes_back(store, dtype):
    written = store.put(Payload.of(chunk(1, dtype=dtype), header(1, dtype=dtype)))
    kv, again = store.get(header(1, dtype=dtype)).kv(), chunk(1, dtype=dtype)
    assert (kv.keys.dtype, kv.values.dtype) == (dtype, dtype)
    assert torch.equal(kv.keys, again.keys)
    assert torch.equal(kv.values, again.values)
    assert written == sum(path.stat().st_size for path in payloads(store))


def test_what_was_not_put_is_none(store):
    assert store.get(header(1)) is None
    store.put(payload(1))
    assert store.get(header(2)) is None


def test_other_expectations_of_the_same_key_are_a_miss(store):
    """The payload says what it is; one that says something else is not used."""
    for wrong in (
        {"engine": "another"},
        {"shape": (3, 2, 6, 8)},
        {"dtype": "torch.float16"},
        {"codec": "int8"},
        {"version": FORMAT_VERSION + 1},
    ):
        store.put(payload(1))
        assert store.get(replace(header(1), **wrong)) is None


def test_a_truncated_payload_is_a_miss_and_can_be_put_again(store, caplog):
    store.put(payload(1))
    (path,) = payloads(store)
    path.write_bytes(path.read_bytes()[:-7])
    assert not holds(store, 1)
    assert "damaged" in caplog.text
    assert store.stats().entries == 0
    assert store.contains_many([header(1).key]) == set()
    store.put(payload(1))
    assert holds(store, 1)


def test_swapped_payloads_are_misses(store):
    """Equal in shape, but each the other's chunk."""
    store.put(payload(1))
    store.put(payload(2))
    one, two = payloads(store)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert not holds(store, 1)
    assert not holds(store, 2)


def test_verify_finds_a_flipped_bit_and_spares_the_rest(store):
    for seed in (1, 2, 3):
        store.put(payload(seed))
    assert store.verify() == []
    path = payloads(store)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (problem,) = store.verify()
    assert header(2).key in problem
    assert [holds(store, seed) for seed in (1, 2, 3)] == [True, False, True]
    assert store.verify() == []


def test_verify_removes_files_that_no_entry_names(store):
    """A process that was killed leaves such a file."""
    store.put(payload(1))
    orphan = payloads(store)[0].with_name(f"{'e' * 28}.val")
    orphan.write_bytes(b"half a payload")
    problems = store.verify()
    assert not orphan.exists()
    assert [problem for problem in problems if orphan.name not in problem] == []
    assert holds(store, 1)


def test_the_least_recently_used_chunks_go_first(tmp_path, store):
    """When the limit is reached; a chunk that was just put, or just used, stays."""
    one = store.put(payload(0, 200))
    small = DiskStore(tmp_path / "small", size_limit=100_000 + 6 * one)  # the index takes its part
    for seed in range(20):
        small.put(payload(seed, 200))
        small.touch([header(0).key])
        assert holds(small, seed, 200)
        assert holds(small, 0, 200)
    kept = [
        seed for seed in range(20) if header(seed).key in small.contains_many([header(seed).key])
    ]
    assert 4 <= len(kept) <= 7
    assert kept == [0, *range(21 - len(kept), 20)]
    assert small.stats().nbytes <= small.size_limit
    small.close()


def test_a_payload_larger_than_the_limit_is_not_kept(tmp_path, caplog):
    """It says so, and pushes nothing else out."""
    small = DiskStore(tmp_path / "small", size_limit=100_000)
    small.put(payload(1))
    assert small.put(payload(2, 2000)) == 0
    assert "size_limit" in caplog.text
    assert not holds(small, 2, 2000)
    assert holds(small, 1)
    small.close()


def test_eviction_by_tag_and_counts(store):
    for seed, tag in enumerate(["a", "b", "a", None]):
        store.put(payload(seed), tag)
    keys = [header(seed).key for seed in range(5)]
    assert store.contains_many(keys) == set(keys[:4])
    stats = store.stats()
    assert (stats.entries, stats.directory) == (4, str(store.directory))
    assert sum(p.stat().st_size for p in payloads(store)) <= stats.nbytes <= stats.size_limit
    assert store.evict("a") == {keys[0], keys[2]}
    assert store.evict("nobody's") == set()
    assert [holds(store, seed) for seed in range(4)] == [False, True, False, True]
    assert len(payloads(store)) == store.stats().entries == 2


def _answer(directory: Path, pipe) -> None:
    """Another process: reads what the first has put, and puts another."""
    store = DiskStore(directory)
    found = holds(store, 1)
    store.put(payload(2))
    pipe.send(found)


def test_processes_see_each_others_chunks(store):
    store.put(payload(1))
    assert not holds(store, 2)
    receive, send = SPAWN.Pipe(duplex=False)
    other = SPAWN.Process(target=_answer, args=(store.directory, send))
    other.start()
    assert receive.poll(60)
    assert receive.recv()
    other.join(60)
    assert holds(store, 2)


def _put_forever(directory: Path, pipe) -> None:
    store, seed = DiskStore(directory), 0
    while True:
        store.put(payload(seed, 400))
        pipe.send(seed)
        seed += 1


def test_what_was_reported_survives_a_kill(tmp_path):
    """Every chunk whose put had returned when the process was killed reads back equal."""
    receive, send = SPAWN.Pipe(duplex=False)
    writer = SPAWN.Process(target=_put_forever, args=(tmp_path / "chunks", send))
    writer.start()
    send.close()
    reported = []
    while len(reported) < 30:
        assert receive.poll(60)
        reported.append(receive.recv())
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    while receive.poll(0):
        try:
            reported.append(receive.recv())
        except EOFError:
            break
    store = DiskStore(tmp_path / "chunks")
    assert [seed for seed in reported if not holds(store, seed, 400)] == []
    store.verify()
    assert all(holds(store, seed, 400) for seed in reported)
    assert store.verify() == []
    store.close()


def test_a_fork_finds_nobody_in_sqlite(tmp_path):
    """Whose locks a child would inherit, held by threads that it has not."""
    store = DiskStore(tmp_path / "chunks")
    stop = threading.Event()

    def work(number: int) -> None:
        seed = number
        while not stop.is_set():
            store.put(payload(seed))
            assert holds(store, seed)
            store.touch([header(seed).key])
            seed += 10

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        for number in range(25):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    store.put(payload(10_000 + number))
                    os._exit(0 if holds(store, 10_000 + number) else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(holds(store, 10_000 + number) for number in range(25))
    assert store.verify() == []
    store.close()
