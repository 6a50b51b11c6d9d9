"""What a request reads, computes, stores and reports; and what engines share of one folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import a3_engine.fusion.encoding as encoding_module
from a3_engine import A3Engine, Chunk, Message, Precomputed
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import CHATML, STRICT, tiny_model, tiny_tokenizer


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """Counts how often each token sequence is computed alone, by the real function."""
    counts: Counter = Counter()
    real = encoding_module.encode_chunks

    def counting(decoder, rotation, chunks, prefix=None):
        counts.update(tuple(ids) for ids in chunks)
        time.sleep(0.05)  # long enough for others to arrive
        return real(decoder, rotation, chunks, prefix)

    monkeypatch.setattr(encoding_module, "encode_chunks", counting)
    return counts


def payloads(engine: A3Engine) -> list[Path]:
    return list(Path(engine.stats().directory).glob("**/*.val"))


def check_sums(report, n_chunks: int) -> None:
    parts = report.cached_tokens + report.created_tokens + report.fresh_tokens
    assert parts == report.prompt_tokens
    assert report.hits + report.misses == len(report.chunks) == n_chunks
    assert report.fused == (report.fallback_reason is None)


def test_a_report_adds_up_and_a_second_request_only_hits(tiny_engine):
    engine = tiny_engine()
    prompt = engine.plan(ASK, [LAMP, SHORE, LAMP])
    first, second = (
        engine.generate(prompt, selector="a3", ratio=0.2, max_new_tokens=8) for _ in range(2)
    )
    assert first.text == second.text
    reports = first.report, second.report
    for report in reports:
        check_sums(report, 3)
        assert report.prompt_tokens == prompt.n_tokens
        layout = prompt.layout(engine.runtime.planner.prefix_ids)
        assert report.recomputed_tokens == int((prompt.n_tokens - layout.n_question) * 0.2)
        assert report.ttft_s > 0
        assert report.ttft_s >= report.plan_s + report.load_s + report.encode_s + report.select_s
        assert (
            min(report.plan_s, report.load_s, report.select_s, report.recompute_s, report.decode_s)
            > 0
        )
    assert (reports[0].hits, reports[0].misses) == (1, 2)  # the third chunk is the first again
    assert (reports[1].hits, reports[1].misses) == (3, 0)
    assert reports[0].bytes_written > 0
    assert reports[0].encode_s > 0
    assert (reports[1].created_tokens, reports[1].bytes_written, reports[1].encode_s) == (0, 0, 0)
    assert reports[1].bytes_read == reports[0].bytes_read + reports[0].bytes_written > 0
    assert {chunk.text for chunk in reports[1].chunks} == {LAMP, SHORE}


def test_a_report_can_be_read(tiny_engine):
    """The counts stand in its text and among its plain values."""
    answer = tiny_engine().generate(ASK, chunks=[LAMP], selector="a3", ratio=0.3, max_new_tokens=6)
    report = answer.report
    text, values = str(report), report.to_dict()
    for name in ("prompt", "cached", "created", "fresh", "recomputed", "generated"):
        assert f" {getattr(report, f'{name}_tokens')} " in text
        assert values[f"{name}_tokens"] == getattr(report, f"{name}_tokens")
    assert "a3" in text
    assert "0.3" in text
    assert LAMP not in repr(values)
    plain = tiny_engine().generate(ASK, selector="full_prefill", max_new_tokens=6).report
    check_sums(plain, 0)
    assert plain.fallback_reason in str(plain)


def test_a_chunk_that_several_threads_miss_is_computed_once(tiny_engine, encoded):
    """So is the prefix that they all stand after."""
    engine = tiny_engine()
    engine.runtime  # noqa: B018  loaded
    start = threading.Barrier(4)

    def ask(n: int) -> str:
        start.wait()
        chunks = [LAMP, SHORE] if n % 2 else [SHORE, LAMP]
        return engine.generate(ASK, chunks=chunks, max_new_tokens=4).text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(encoded) == 3
    assert set(encoded.values()) == {1}


def test_precomputing_twice_computes_once(tiny_engine, encoded):
    engine = tiny_engine()
    chunks = [LAMP, Chunk(SHORE, "doc"), f" {LAMP}\n", "", "  \n"]
    assert engine.precompute(chunks, progress=False) == Precomputed(computed=2, present=1)
    assert engine.precompute(chunks, progress=False) == Precomputed(computed=0, present=3)
    assert set(encoded.values()) == {1}
    report = engine.generate(ASK, chunks=chunks, max_new_tokens=4).report
    assert report.misses == 0
    assert set(encoded.values()) == {1}


def test_what_a_request_reads_counts_as_used_last(tiny_engine):
    """So that a full store gives up what nobody asks for."""
    engine = tiny_engine()
    engine.precompute([LAMP, SHORE], progress=False)
    library = engine.runtime.library
    requests = [(engine.generate, LAMP), (engine.fuse, SHORE), (engine.generate, LAMP)]
    for request, chunk in requests:
        request(ASK, chunks=[chunk])
        keys = [library.header(segment).key for _, segment in engine.plan(ASK, [chunk]).cached]
        assert [row.key for row, _ in library.store.entries()][-len(keys) :] == keys


def test_a_missing_chunk_takes_no_room_of_what_it_is_used_with(tiny_engine):
    """The oldest of a full store stays where a request needs it beside a chunk to be computed."""
    engine = tiny_engine()
    engine.precompute([LAMP, SHORE], progress=False)
    library = engine.runtime.library
    [oldest] = [each for _, each in engine.plan(ASK, [LAMP]).cached if each.kind == "chunk"]
    for row in range(40):  # until the next one makes the store give something up
        engine.precompute([f"{SHORE} {row}"], progress=False)
    store = library.store
    store.size_limit = engine.stats().nbytes
    report = engine.generate(ASK, chunks=[LAMP, "A new chunk."], max_new_tokens=2).report
    assert (report.hits, report.misses) == (1, 1)
    assert library.missing([oldest]) == []
    [gone] = [each for _, each in engine.plan(ASK, [SHORE]).cached if each.kind == "chunk"]
    assert library.missing([gone]) == [gone]


def test_an_evicted_chunk_is_a_miss(tiny_engine):
    """Given as a chunk it is computed anew; in plain text it is not known any more."""
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "lamp"), Chunk(SHORE, "shore")], progress=False)
    assert engine.evict("lamp") == 1
    assert engine.evict("lamp") == 0
    plain = engine.generate(f"{LAMP}\n{SHORE}\n{ASK}", max_new_tokens=4).report
    assert [chunk.text for chunk in plain.chunks] == [SHORE]
    report = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=4).report
    assert [chunk.hit for chunk in report.chunks] == [False, True]


@pytest.mark.parametrize("damage", ["truncated", "replaced", "missing", "unreadable"])
def test_a_damaged_payload_does_not_change_the_answer(tiny_engine, damage):
    """What cannot be read is computed again and stored again."""
    engine = tiny_engine()
    expected = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=20)
    for path in payloads(engine):
        content = path.read_bytes()
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "replaced":
            path.write_bytes(b"not a payload")
        elif damage == "unreadable":
            path.mkdir()
    again = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=20)
    assert again.text == expected.text
    assert again.report.misses == 2
    healed = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=20)
    assert (healed.text, healed.report.misses) == (expected.text, 0)


def test_an_unmodified_prompt_is_served_from_the_cache(tiny_engine):
    """Plain text that holds stored chunks is answered as with the chunks given apart."""
    engine = tiny_engine()
    assert engine.generate(f"{LAMP}\n\n{ASK}", max_new_tokens=4).report.cached_tokens == 0
    engine.precompute([LAMP, SHORE], progress=False)
    parts = ["Context:\n", Chunk(LAMP), "\n\n", Chunk(SHORE), f"\n\n{ASK}"]
    given = engine.generate([Message("user", parts)], max_new_tokens=20)
    plain = engine.generate(f"Context:\n{LAMP}\n\n{SHORE}\n\n{ASK}", max_new_tokens=20)
    assert plain.text == given.text
    check_sums(plain.report, 2)
    assert (plain.report.hits, plain.report.misses) == (2, 0)
    assert plain.report.cached_tokens == given.report.cached_tokens > 0


def test_a_closed_engine_opens_anew(tiny_engine):
    engine = tiny_engine()
    text = engine.generate(ASK, chunks=[LAMP], max_new_tokens=8).text
    engine.close()
    engine.close()
    again = engine.generate(ASK, chunks=[LAMP], max_new_tokens=8)
    assert (again.text, again.report.misses) == (text, 0)


def test_two_engines_may_share_a_loaded_model(tiny_engine, tmp_path):
    """Each with its own method; both answer as one engine does that has the model alone."""
    options = {"chunks": [LAMP, SHORE], "max_new_tokens": 12}
    alone = [tiny_engine().generate(ASK, ratio=ratio, **options).text for ratio in (0.0, 0.4)]
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    engines = [
        A3Engine.from_pretrained(model, tokenizer, cache_dir=tmp_path / "cache", ratio=ratio)
        for ratio in (0.0, 0.4)
    ]
    assert [engine.generate(ASK, **options).text for engine in engines] == alone
    for engine in engines:
        engine.close()


def other_engines():
    """Each differs from the first in one thing that a chunk's keys and values depend on."""
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    theta = tiny_model("llama").config
    theta.rope_parameters = {"rope_type": "default", "rope_theta": 9999.0}
    yield "dtype", tiny_model("llama", torch.bfloat16), tiny_tokenizer(), {}
    yield "weights", changed, tiny_tokenizer(), {}
    yield "architecture", tiny_model("qwen3"), tiny_tokenizer(), {}
    yield "rope", tiny_model(theta), tiny_tokenizer(), {}
    yield "template", tiny_model("llama"), tiny_tokenizer(STRICT), {}
    yield "prefix", tiny_model("llama"), tiny_tokenizer(), {"encode_prefix": "none"}


@pytest.mark.parametrize("difference", [name for name, *_ in other_engines()])
def test_other_engines_on_one_folder_read_nothing(tiny_engine, tmp_path, difference):
    """A chunk is served only to the engine that computes the same of it."""
    first = tiny_engine()
    first.precompute([LAMP], progress=False)
    same = A3Engine.from_pretrained(
        tiny_model("llama"), tiny_tokenizer(CHATML), cache_dir=tmp_path / "cache"
    )
    assert same.generate(ASK, chunks=[LAMP], max_new_tokens=4).report.hits == 1
    ((_, model, tokenizer, options),) = (e for e in other_engines() if e[0] == difference)
    other = A3Engine.from_pretrained(model, tokenizer, cache_dir=tmp_path / "cache", **options)
    report = other.generate(ASK, chunks=[LAMP], max_new_tokens=4).report
    assert (report.hits, report.misses) == (0, 1)
    assert other.generate(ASK, chunks=[LAMP], max_new_tokens=4).report.hits == 1
    same.close()
    other.close()


def test_a_tag_given_later_evicts_too(tiny_engine):
    """A chunk stored without a tag, or under another one, belongs to the last document."""
    engine = tiny_engine()
    engine.precompute([LAMP], progress=False)
    engine.precompute([Chunk(LAMP, "first")], progress=False)
    engine.precompute([Chunk(LAMP, "second")], progress=False)
    assert engine.evict("first") == 0
    assert engine.evict("second") == 1
    assert engine.generate(f"{LAMP} {ASK}", max_new_tokens=2).report.cached_tokens == 0


def test_the_engine_has_its_last_report(tiny_engine):
    engine = tiny_engine()
    assert engine.last_report is None
    for question in (ASK, "Who rows there?"):
        answer = engine.generate(question, chunks=[LAMP], max_new_tokens=2)
        assert engine.last_report is answer.report


def test_the_former_name_of_prepare_warns(tiny_engine):
    engine = tiny_engine()
    with pytest.warns(DeprecationWarning, match="prepare"):
        prompt, cache = engine.fuse(ASK, chunks=[LAMP])
    assert cache.layers[0].n_prompt == prompt.n_tokens
