"""Killing a program at random moments while it ingests, evicts or unpacks weights."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from a3_engine import A3Engine, Chunk
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.model.gguf import dequantized
from tests.engine.test_gguf import small_file
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer

ASK = "Which lamp burns?"
LONGEST_S, LONGEST_WAIT_S = 0.4, 20.0  # that a program lives; before, until it works


def _text(number: int) -> str:
    return f"Document {number} says that lamp {number * 7} burns through night {number * 13}."


def _killed(
    work: Callable[[], None], rng: random.Random, works: Callable[[], bool] = lambda: True
) -> None:
    """Begin some work in a process of its own, and kill it somewhere once it ``works``."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    patience = time.monotonic() + LONGEST_WAIT_S
    while not works() and time.monotonic() < patience:
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, LONGEST_S))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_ingestion(folder: Path, kills: int, until: float) -> Counter[str]:
    """What was reported as stored or evicted is, after each kill, and answers stay the same."""
    rng, counts = random.Random(0), Counter[str]()
    options = {"cache_dir": folder / "cache", "stand_in": STAND_IN}
    engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), **options)
    expected = engine.generate(ASK, chunks=[_text(0), _text(1)], max_new_tokens=4).text
    record = os.open(folder / "reported", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def ingest_and_evict(first: int) -> None:
        for number in range(first, first + 1000):
            engine.precompute([Chunk(_text(number), f"{number}")], progress=False)
            os.write(record, f"+{number}\n".encode())
            if number % 3 == 0 and number > first:
                gone = number - 1
                os.write(record, f"?{gone}\n".encode())  # may be gone from here on
                engine.evict(f"{gone}")
                os.write(record, f"-{gone}\n".encode())

    while counts["kills"] < kills and time.monotonic() < until:
        engine.close()  # as a program that starts anew
        reported = os.fstat(record).st_size
        _killed(
            lambda: ingest_and_evict(1000 * counts["kills"] + 10),
            rng,
            # Every other one is killed at any time, also while it opens the store.
            lambda: counts["kills"] % 2 == 0 or os.fstat(record).st_size > reported,  # noqa: B023
        )
        counts["kills"] += 1
    lines = (folder / "reported").read_text().split()
    stored, begun, evicted = ({line[1:] for line in lines if line[0] == sign} for sign in "+?-")
    counts |= {"reported": len(stored), "evicted": len(evicted)}
    missing = {
        segment.text for segment in engine.runtime.library.missing(
            engine.runtime.planner.segments(_text(int(n)) for n in sorted(stored))
        )
    }  # fmt: skip
    assert missing <= {_text(int(number)) for number in begun}, "what was reported is lost"
    assert missing >= {_text(int(number)) for number in evicted}, "what was evicted is there"
    answer = engine.generate(ASK, chunks=[_text(0), _text(1)], max_new_tokens=4)
    assert (answer.text, answer.report.hits) == (expected, 2)
    assert engine.verify() == []
    engine.close()
    store = DiskStore(folder / "cache" / "chunks")
    assert len(list(store.directory.glob("**/*.val"))) == store.stats().entries
    store.close()
    return counts


def kill_unpacking(folder: Path, kills: int, until: float) -> Counter[str]:
    """Weights that were half unpacked are never taken for whole ones, and do not pile up."""
    rng, counts = random.Random(0), Counter[str]()
    source = small_file(folder)
    whole = {
        path.name: path.read_bytes() for path in dequantized(source, folder / "sound").iterdir()
    }
    while counts["kills"] < kills and time.monotonic() < until:
        cache = folder / f"cache {counts['kills'] // 20}"
        _killed(lambda: dequantized(source, cache), rng)  # noqa: B023
        counts["kills"] += 1
        if counts["kills"] % 20 == 0:
            found = {path.name: path.read_bytes() for path in dequantized(source, cache).iterdir()}
            assert found == whole, "half unpacked weights were taken for whole ones"
            counts["unpacked"] += 1
    return counts
