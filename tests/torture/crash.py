"""Killing writers at random moments: what they reported as stored is there afterwards."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import holds, payload

FORK = multiprocessing.get_context("fork")
WRITERS = 4
TOKENS = 40


def _write(folder: Path, first: int, record: Path) -> None:
    """Put new and, now and then, old chunks; report each one when its put has returned."""
    store = DiskStore(folder)
    reported = os.open(record, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    rng = random.Random(first)
    for seed in range(first, first + 1_000_000):
        again = rng.randrange(first, seed) if seed > first and rng.random() < 0.3 else seed
        store.put(payload(again, TOKENS))
        os.write(reported, f"{again}\n".encode())
        if again != seed:
            store.put(payload(seed, TOKENS))
            os.write(reported, f"{seed}\n".encode())


def crash(folder: Path, kills: int, until: float) -> Counter[str]:
    """Kill one of four writers again and again; check everything at the end."""
    rng, counts = random.Random(0), Counter[str]()
    chunks, record = folder / "chunks", folder / "reported"
    DiskStore(chunks).close()

    def start(number: int) -> multiprocessing.process.BaseProcess:
        writer = FORK.Process(target=_write, args=(chunks, number * 1_000_000, record))
        writer.start()
        return writer

    writers = [start(number) for number in range(WRITERS)]
    started = WRITERS
    while counts["kills"] < kills and time.monotonic() < until:
        time.sleep(rng.uniform(0.0, 0.15))
        place = rng.randrange(WRITERS)
        os.kill(writers[place].pid or 0, signal.SIGKILL)
        writers[place].join()
        counts["kills"] += 1
        writers[place] = start(started)
        started += 1
    for writer in writers:
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        counts["kills"] += 1

    files = len(list(chunks.glob("**/*.val")))
    store = DiskStore(chunks)  # opening removes what the killed left
    counts["entries"] = store.stats().entries
    counts["orphans before opening"] = files - counts["entries"]
    assert len(list(chunks.glob("**/*.val"))) == counts["entries"]
    # A replaced chunk whose writer died before removing the old file is an orphan too.
    assert counts["orphans before opening"] <= 2 * counts["kills"]
    reported = {int(line) for line in record.read_text().split()}
    counts["reported"] = len(reported)
    lost = [seed for seed in reported if not holds(store, seed, TOKENS)]
    assert lost == [], f"{len(lost)} reported chunks are lost"
    assert store.verify() == []
    store.put(payload(10**9, TOKENS))
    assert holds(store, 10**9, TOKENS)
    store.close()
    return counts
