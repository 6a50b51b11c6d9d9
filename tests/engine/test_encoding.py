"""Chunks computed together: each as if it had been computed alone."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
import torch

import a3_engine.fusion.encoding as encoding_module
from a3_engine import Chunk
from a3_engine.chunks.keyed_locks import KeyedLocks
from a3_engine.fusion.encoding import (
    BATCH_ROWS,
    CPU_BATCH_ROWS,
    LEAST_FILLED,
    STEP,
    batches,
    encode_chunks,
)
from tests.tiny import CONFIGS, VOCABULARY


@pytest.mark.parametrize("after", [True, False], ids=["after a prefix", "alone"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_chunk_among_others_is_the_chunk_alone(tiny_engine, name, after):
    engine = tiny_engine(name)
    rng = random.Random(3)
    rotation, decoder = engine.runtime.gate.rotation, engine.runtime.model.get_decoder()
    chunks = [[rng.randrange(4, VOCABULARY) for _ in range(n)] for n in (17, 20, 18, 1)]
    prefix = (
        encode_chunks(decoder, rotation, [engine.runtime.planner.prefix_ids])[0] if after else None
    )
    together = encode_chunks(decoder, rotation, chunks, prefix)
    for ids, one in zip(chunks, together, strict=True):
        (alone,) = encode_chunks(decoder, rotation, [ids], prefix)
        assert one.n_tokens == len(ids)
        torch.testing.assert_close(one.keys, alone.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.values, alone.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("device", "most"), [("cpu", CPU_BATCH_ROWS), ("cuda", BATCH_ROWS)])
def test_batches_hold_everything_once_and_are_well_filled(device, most):
    rng = random.Random(5)
    lengths = [rng.randrange(1, 700) for _ in range(500)]
    items = list(range(len(lengths)))
    found = list(batches(items, lengths, torch.device(device)))
    assert sorted(item for batch in found for item in batch) == items
    for batch in found:
        ours = [lengths[item] for item in batch]
        assert len(batch) == 1 or len(batch) * max(ours) <= most
        assert min(ours) >= LEAST_FILLED * max(ours)
    assert len(found) < len(items)
    assert list(batches([], [], torch.device(device))) == []


def test_any_lengths_make_few_shapes(tiny_engine):
    """What is kept for each shape would grow with a corpus."""
    engine = tiny_engine()
    rotation, decoder = engine.runtime.gate.rotation, engine.runtime.model.get_decoder()
    widths = set()
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, args: widths.add(args[0].shape[1]))
    for length in range(1, 97):
        (kv,) = encode_chunks(decoder, rotation, [[5] * length])
        assert kv.n_tokens == length
    hook.remove()
    assert widths == set(range(STEP, 97, STEP))


def test_threads_that_ingest_overlapping_batches_compute_each_chunk_once(tiny_engine, monkeypatch):
    """None waits for another that waits for it, whatever order they come in."""
    engine, counts, real = tiny_engine(), Counter(), encoding_module.encode_chunks

    def counting(decoder, rotation, chunks, prefix=None):
        counts.update(tuple(ids) for ids in chunks)
        return real(decoder, rotation, chunks, prefix)

    monkeypatch.setattr(encoding_module, "encode_chunks", counting)
    monkeypatch.setattr(encoding_module, "CPU_BATCH_ROWS", 80)  # batches of four
    texts = [f"Lamp {n} burns through night {n * 7}." for n in range(40)]
    errors = []

    def ingest(seed: int) -> None:
        mine = random.Random(seed).sample(texts, 30)
        try:
            engine.precompute([Chunk(text, "lamps") for text in mine], progress=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ingest, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a deadlock"
    assert not errors
    assert set(counts.values()) == {1}
    wanted = {text for seed in range(4) for text in random.Random(seed).sample(texts, 30)}
    assert engine.precompute(wanted, progress=False).present == len(wanted)


def test_flights_of_other_chunks_do_not_wait_and_nothing_is_left_of_them():
    flights = KeyedLocks()
    first = flights.of("a", "b", "a")
    other = flights.of("c")  # at once
    arrived = threading.Event()

    def wait() -> None:
        with flights.of("c", "b"):
            arrived.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    other.close()
    assert not arrived.wait(0.1)
    closing = threading.Thread(target=first.close)  # who closes need not be who opened
    closing.start()
    assert arrived.wait(10)
    waiting.join(10)
    closing.join(10)
    assert not flights._flights
