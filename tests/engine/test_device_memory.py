"""The device's memory between requests: chunks stay as long as there is room, and no longer."""

import pytest
import torch

from a3_engine import Chunk, assembly
from a3_engine.chunks.resident import Resident
from a3_engine.kv import ChunkKV
from tests.texts import ASK, LAMP


def chunk(n_tokens: int) -> ChunkKV:
    return ChunkKV(*torch.randn(2, 1, 1, n_tokens, 16))


def test_the_chunks_used_last_stay():
    one = chunk(4).nbytes
    resident = Resident(3 * one)
    chunks = {key: chunk(4) for key in "abcd"}
    for key in "abc":
        resident.put(key, chunks[key])
    assert resident.get("a") is chunks["a"]
    resident.put("d", chunks["d"])
    assert resident.get("b") is None
    resident.put("e", chunk(13))  # larger than all there is room for
    assert [key for key in "abcde" if resident.get(key)] == ["a", "c", "d"]
    resident.discard(["c", "unknown"])
    assert resident.get("c") is None
    resident.clear()
    assert resident.get("a") is None


def test_a_resident_chunk_gives_the_same_answer(tiny_engine):
    engine = tiny_engine()
    prompt = engine.plan(ASK, [LAMP])
    first = engine.generate(prompt, selector="full_reuse", max_new_tokens=5)
    library = engine.runtime.library
    library.resident.max_bytes = 2**20
    library.keep_resident((segment, library.fetch(segment).kv) for _, segment in prompt.cached)
    engine.runtime.prefix_cache.clear()
    before = library.store.get
    library.store.get = pytest.fail  # nothing is read
    try:
        again = engine.generate(prompt, selector="full_reuse", max_new_tokens=5)
    finally:
        library.store.get = before
    assert str(again) == str(first)
    assert again.report.hits == 1


def test_an_evicted_chunk_is_not_resident(tiny_engine):
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, tag="doc")])
    prompt = engine.plan(ASK, [LAMP])
    library = engine.runtime.library
    library.resident.max_bytes = 2**20
    [segment] = [each for _, each in prompt.cached if each.kind == "chunk"]
    library.keep_resident([(segment, library.fetch(segment).kv)])
    assert engine.evict("doc") == 1
    assert library.resident.get(library.header(segment).key) is None
    assert engine.generate(prompt).report.misses == 1


def fails(monkeypatch, times: int) -> list[int]:
    """The next loadings run out of memory."""
    left, real = [times], assembly.load_chunks

    def load(*args):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    monkeypatch.setattr(assembly, "load_chunks", load)
    return left


def test_memory_that_is_kept_is_given_up_for_a_request(tiny_engine, monkeypatch):
    engine = tiny_engine()
    prompt = engine.plan(ASK, [LAMP])
    expected = engine.generate(prompt, max_new_tokens=5)
    library = engine.runtime.library
    library.resident.max_bytes = 2**20
    library.resident.put("kept", chunk(4))
    # Another question, or the kept turn would serve it.
    other = engine.plan("Who comes?", [LAMP])
    fails(monkeypatch, 1)
    assert engine.generate(other, max_new_tokens=5).report.fused
    assert library.resident.get("kept") is None
    engine.runtime.prefix_cache.clear()
    assert str(engine.generate(prompt, max_new_tokens=5)) == str(expected)


def test_a_request_that_does_not_fit_fails_alone(tiny_engine, monkeypatch):
    engine = tiny_engine()
    prompt = engine.plan(ASK, [LAMP])
    expected = engine.generate(prompt, max_new_tokens=5)
    engine.runtime.prefix_cache.clear()
    fails(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(prompt, max_new_tokens=5)
    assert str(engine.generate(prompt, max_new_tokens=5)) == str(expected)
