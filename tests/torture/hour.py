"""All at once, for as long as is wanted: threads, forks, left streams, evictions, lost folders.

``python -m tests.torture.hour 3600`` prints a line of figures a minute. What is asked for is known
beforehand: every answer has to be the one that an undisturbed engine gave.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from a3_engine import A3Engine, Chunk, StoreError, StoreOptions
from tests.tiny import LONG, STAND_IN, tiny_model, tiny_tokenizer
from tests.torture.endurance import _handles, _resident

THREADS = 16
DOCUMENTS, PROMPTS, TOKENS = 24, 12, 4
MARGIN = 0.05  # nats to the second token: what rounding in a batch may not turn around
SILENCE_S = 240  # before a thread or child hangs; an ingestion may wait 60 for its turn
METHODS = ({}, {"selector": "full_reuse"}, {"ratio": 1.0})
RESIDENT_GROWTH, HANDLE_GROWTH = 64 * 2**20, 40


class Asked(NamedTuple):
    """A request, and its answer."""

    documents: list[str]
    options: dict[str, object]
    answer: str


def _document(number: int) -> str:
    return f"Document {number} says that lamp {number * 7} burns through night {number * 13}. " * 3


def _engine(folder: Path, **options: object) -> A3Engine:
    model = tiny_model(LONG)
    model.generation_config.eos_token_id = 10_000
    return A3Engine.from_pretrained(
        model, tiny_tokenizer(), cache_dir=folder, stand_in=STAND_IN, **options
    )


def _ask(engine: A3Engine, asked: Asked) -> str:
    options = {"max_new_tokens": TOKENS, **asked.options}
    return engine.generate("Which lamp burns?", chunks=asked.documents, **options).text


def _known(folder: Path) -> list[Asked]:
    """Requests whose every token is far ahead of the next."""
    engine, known, rng = _engine(folder), [], random.Random(0)
    while len(known) < PROMPTS:
        documents = [_document(n) for n in rng.sample(range(DOCUMENTS), 3)]
        options = METHODS[len(known) % len(METHODS)]
        answer = engine.generate(
            "Which lamp burns?",
            chunks=documents,
            max_new_tokens=TOKENS,
            logprobs=2,
            **options,
        )
        margins = [token.top[0][1] - token.top[1][1] for token in answer.report.logprobs]
        if min(margins) > MARGIN:
            known.append(Asked(documents, options, answer.text))
    engine.close()
    return known


class Crowd:
    """Threads that use one engine in every way, and what they counted."""

    def __init__(self, engine: A3Engine, known: list[Asked], until: float) -> None:
        self._engine, self._known, self._until = engine, known, until
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self.heard = [time.monotonic()] * THREADS
        self.threads = [threading.Thread(target=self._work, args=(n,)) for n in range(THREADS)]

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._until and not self.failures

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _work(self, number: int) -> None:
        rng = random.Random(number)
        ways: list[tuple[Callable[[Asked], None], int]] = [
            (self._answer, 10), (self._stream, 4), (self._leave, 4), (self._evict, 1),
            (self._ingest, 1), (self._remember, 1),
        ]  # fmt: skip
        acts, weights = zip(*ways, strict=True)
        try:
            while self.goes_on:
                self.heard[number] = time.monotonic()
                [act] = rng.choices(acts, weights)
                act(rng.choice(self._known))
                self.count(act.__name__.strip("_"))
        except BaseException as error:
            self.failures.append(error)

    def _answer(self, asked: Asked) -> None:
        answer = _ask(self._engine, asked)
        assert answer == asked.answer, (answer, asked)

    def _stream(self, asked: Asked) -> None:
        with self._opened(asked, TOKENS) as stream:
            answer = "".join(stream)
        assert answer == asked.answer, (answer, asked)

    def _leave(self, asked: Asked) -> None:
        stream = self._opened(asked, 200)
        next(stream, None)
        if random.random() < 0.5:
            stream.close()

    def _opened(self, asked: Asked, length: int):
        return self._engine.stream(
            "Which lamp burns?", chunks=asked.documents, max_new_tokens=length, **asked.options
        )

    def _evict(self, asked: Asked) -> None:
        with contextlib.suppress(StoreError):  # its folder may be away
            self._engine.evict(asked.documents[0])

    def _ingest(self, asked: Asked) -> None:
        with contextlib.suppress(StoreError):
            self._engine.precompute([Chunk(d, d) for d in asked.documents], progress=False)

    def _remember(self, asked: Asked) -> None:
        self._engine.remember([Chunk(d, d) for d in asked.documents])


def _fork(engine: A3Engine, asked: Asked) -> None:
    """A child that answers, while all threads of its parent are somewhere."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.dump_traceback_later(SILENCE_S, exit=True)
            os._exit(0 if _ask(engine, asked) == asked.answer else 2)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"a forked child hangs (1), errs (2, 3) or died: {status}"


def _take_away(folder: Path, seconds: float) -> None:
    """A folder that is moved away, and later put back over what was made in its place."""
    away = folder.with_name("away")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(away)
    time.sleep(seconds)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            return away.rename(folder)
        except FileNotFoundError:
            return None
        except OSError:  # made again meanwhile
            time.sleep(0.01)
    raise AssertionError("the folder cannot be given back")


def hour(folder: Path, seconds: float, say: Callable[[str], object] = print) -> Counter[str]:
    """Everything at once, for so many seconds; figures at the end."""
    known = _known(folder / "undisturbed")
    cache, shared = folder / "cache", folder / "shared"
    options = StoreOptions(f"file://{shared}", memory_limit=300_000, timeout=2.0)
    engine = _engine(cache, size_limit=1_500_000, store=options)
    crowd = Crowd(engine, known, time.monotonic() + seconds)
    rng, figures = random.Random(0), []
    for thread in crowd.threads:
        thread.start()
    began = noted = time.monotonic()
    while crowd.goes_on:
        _fork(engine, rng.choice(known))
        crowd.count("fork")
        _take_away(rng.choice([cache / "chunks", shared]), rng.uniform(0, 1))
        crowd.count("taken away")
        time.sleep(rng.uniform(0, 2))
        now = time.monotonic()
        if min(crowd.heard) < now - SILENCE_S:
            faulthandler.dump_traceback()
            raise AssertionError("a thread hangs")
        if now - noted >= min(60, seconds / 10):
            noted = now
            figures.append((_resident(), _handles()))
            counts = ", ".join(f"{name} {count}" for name, count in sorted(crowd.counts.items()))
            say(
                f"{now - began:.0f} s: {figures[-1][0] / 2**20:.0f} MiB, {figures[-1][1]} handles, "
                f"{threading.active_count()} threads; {counts}"
            )
    for thread in crowd.threads:
        thread.join(SILENCE_S)
        assert not thread.is_alive(), "a thread hangs"
    if crowd.failures:
        raise crowd.failures[0]
    assert engine.verify() is not None
    assert engine.verify() == []
    engine.close()
    half = len(figures) // 2
    resident, handles = zip(*figures, strict=True)
    assert max(resident[half:]) - max(resident[:half]) < RESIDENT_GROWTH, resident
    assert max(handles[half:]) - max(handles[:half]) < HANDLE_GROWTH, handles
    return crowd.counts


if __name__ == "__main__":
    faulthandler.enable()
    logging.getLogger("a3_engine").setLevel(logging.ERROR)  # a line for each loss
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        print(hour(Path(name), float(sys.argv[1]), lambda line: print(line, flush=True)))
