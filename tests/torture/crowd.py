"""Threads and processes on one folder: an engine's requests among other writers and evictions."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import a3_engine.fusion.encoding as encoding_module
from a3_engine import A3Engine, StoreOptions
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.segments import Segment
from tests.store.stored import header, holds, payload
from tests.tiny import tiny_model, tiny_tokenizer

FORK = multiprocessing.get_context("fork")
THREADS, PROCESSES = 8, 4
SEEDS, TEXTS, TOKENS = 60, 24, 100
SIZE_LIMIT = 1_500_000


def _mix(folder: Path, number: int, seconds: float, counts) -> None:
    """Get, put and evict chunks that all processes share; each must be whole or absent."""
    store, rng = DiskStore(folder, SIZE_LIMIT), random.Random(number)
    done, until = Counter[str](), time.monotonic() + seconds
    while time.monotonic() < until:
        seed, dice = rng.randrange(SEEDS), rng.random()
        if dice < 0.6:
            done["hits" if holds(store, seed, TOKENS) else "misses"] += 1
        elif dice < 0.9:
            store.put(payload(seed, TOKENS), tag=f"tag {seed % 5}")
            done["puts"] += 1
        elif dice < 0.95:
            done["evicted"] += len(store.evict(f"tag {rng.randrange(5)}"))
        elif dice < 0.99:
            store.contains_many(header(s).key for s in range(SEEDS))
        else:
            assert store.verify() == []
            done["verified"] += 1
    store.close()
    counts.put(done)


def crowd(folder: Path, seconds: float) -> Counter[str]:
    """8 threads of one engine and 4 processes, for so many seconds."""
    queue = FORK.Queue()
    others = [
        FORK.Process(target=_mix, args=(folder / "chunks", n, seconds, queue))
        for n in range(PROCESSES)
    ]
    (folder / "chunks").mkdir(parents=True)
    for other in others:
        other.start()
    engine = A3Engine.from_pretrained(
        tiny_model("llama"),
        tiny_tokenizer(),
        cache_dir=folder,
        size_limit=SIZE_LIMIT,
        store=StoreOptions(memory_limit=100_000),
    )
    counts = _threads(engine, seconds)
    for _ in others:
        counts.update(queue.get(timeout=120))
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert engine.runtime.store.stats().nbytes <= SIZE_LIMIT
    assert engine.verify() == []
    engine.close()
    return counts


def _threads(engine: A3Engine, seconds: float) -> Counter[str]:
    library = engine.runtime.library
    assert library is not None
    segments = [
        Segment("chunk", tuple(engine.runtime.planner.chunk_ids(text)), text, f"doc {n % 4}")
        for n in range(TEXTS)
        for text in [f"Document {n} says that lamp {n * 7} burns through night {n * 13}. " * 3]
    ]
    references = [library.fetch(segment).kv for segment in segments]
    references = [type(kv)(kv.keys.clone(), kv.values.clone()) for kv in references]
    counts, counting = Counter[str](), threading.Lock()
    computing: set[tuple[int, ...]] = set()
    encode, failures = encoding_module.encode_chunks, []

    def counted(decoder, rotation, chunks: Sequence[Sequence[int]], prefix=None):
        mine = {tuple(ids) for ids in chunks}
        with counting:
            assert not mine & computing, "two flights for one chunk"
            computing.update(mine)
            counts["computed"] += len(mine)
        try:
            return encode(decoder, rotation, chunks, prefix)
        finally:
            with counting:
                computing.difference_update(mine)

    def work(number: int) -> None:
        rng, until = random.Random(number), time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                place = rng.randrange(TEXTS)
                if rng.random() < 0.02:
                    engine.evict(f"doc {rng.randrange(4)}")
                    continue
                fetched = library.fetch(segments[place])
                assert torch.equal(fetched.kv.keys, references[place].keys)
                assert torch.equal(fetched.kv.values, references[place].values)
                with counting:
                    counts["requests"] += 1
        except BaseException as error:
            failures.append(error)

    encoding_module.encode_chunks = counted
    try:
        workers = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds + 120)
            assert not worker.is_alive(), "a deadlock"
    finally:
        encoding_module.encode_chunks = encode
    if failures:
        raise failures[0]
    return counts
