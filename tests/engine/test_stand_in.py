"""Stand-ins: part of what a chunk is, exact at both ends, and nobody else's text."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import a3_engine.chunks.library as library_module
import a3_engine.fusion.encoding as encoding_module
from a3_engine import A3Engine, Chunk, Message, Precomputed
from a3_engine.chunks.fingerprint import chunk_key
from a3_engine.chunks.stand_in import PASSAGES
from a3_engine.model.cache_argument import OURS, with_cache
from a3_engine.segments import Segment
from tests.engine.prompts import (
    SHAPES,
    build_prompt,
    full_prefill,
    fused_logits,
    independent_full_reuse,
)
from tests.tiny import CONFIGS

STAND_IN = ["The lamp burns.", "A keeper of the harbour, every evening."]
OTHER = ["Given the context."]
TEXTS = ["The lighthouse stands.", "Its lamp burns through the night.", "The keeper answers."]


def after(engine: A3Engine, passages: list[str]) -> tuple[int, ...]:
    """Ids of passages as they stand in a prompt."""
    planner, ids = engine.runtime.planner, []
    for text in passages:
        ids += [*planner.tokenize_text(text), *planner.tokenize_text("\n\n")]
    return tuple(ids)


def stored(engine: A3Engine, text: str):
    """A precomputed chunk's header and KV."""
    library, ids = engine.runtime.library, engine.runtime.planner.chunk_ids(text)
    header = library.header(Segment("chunk", ids, text))
    payload = library.store.get(header)
    return header, payload and payload.kv()


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("shape", ["many chunks", "no prefix"])
def test_both_ends_of_the_ratio_are_exact(tiny_engine, architecture, shape, monkeypatch):
    """All recomputed: the full prefill. None: chunks computed after prefix and stand-in, but for
    the head of the one that opens the prompt.
    """
    monkeypatch.setattr(library_module, "HEAD_TOKENS", 6)
    engine = tiny_engine(architecture, stand_in=STAND_IN)
    prompt = build_prompt(engine, SHAPES[shape])
    expected = full_prefill(engine, prompt).logits[0, -1]
    for selector in ("mend", "a3"):
        ours = fused_logits(engine, prompt, selector, 1.0)
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    passages = after(engine, STAND_IN)
    reused = independent_full_reuse(engine, engine.runtime.model, prompt, passages).logits[0, -1]
    miss = fused_logits(engine, prompt, "full_reuse", 0.0)
    torch.testing.assert_close(miss, reused, atol=1e-3, rtol=0)
    assert not torch.allclose(miss, expected, atol=1e-3)
    assert torch.equal(fused_logits(engine, prompt, "full_reuse", 0.0), miss)  # now a hit
    again = tiny_engine(architecture, stand_in=STAND_IN)
    assert torch.equal(fused_logits(again, prompt, "full_reuse", 0.0), miss)


@pytest.mark.parametrize("head", [6, 64])
def test_the_head_of_the_chunk_that_opens_a_prompt_is_exact(tiny_engine, monkeypatch, head):
    """Ingested ahead, never picked, never moved; what stands elsewhere has none."""
    monkeypatch.setattr(library_module, "HEAD_TOKENS", head)
    engine = tiny_engine(stand_in=STAND_IN)
    assert engine.precompute(TEXTS, progress=False).computed == len(TEXTS)
    assert engine.precompute(TEXTS, progress=False) == Precomputed(0, len(TEXTS))
    prompt = engine.plan("Who keeps the lamp?", TEXTS)
    expected = getattr(full_prefill(engine, prompt), OURS).layers
    _, cache = engine.prepare(prompt, ratio=0.5)
    with torch.inference_mode():
        engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, cache)
        )
    first, *others = cache.fusion.layout.chunks
    n_exact = min(head, first.stop - first.start)
    assert [span.exact for span in (first, *others)] == [n_exact, 0, 0]
    opening = slice(first.start, first.start + n_exact)
    assert not set(range(opening.start, opening.stop)) & set(cache.fusion.selected.tolist())
    for ours, theirs in zip(cache.layers, expected, strict=True):
        assert_near = torch.testing.assert_close
        assert_near(ours.keys[:, :, opening], theirs.keys[:, :, opening], atol=1e-4, rtol=1e-4)
        assert_near(ours.values[:, :, opening], theirs.values[:, :, opening], atol=1e-4, rtol=1e-4)
    report = engine.generate(prompt, max_new_tokens=2).report
    assert (report.hits, report.misses, report.created_tokens) == (3, 0, 0)
    assert report.encode_s == 0.0
    system = [Message("system", "Answer."), Message("user", [Chunk(TEXTS[0]), "Who?"])]
    _, cache = engine.prepare(system)
    assert [span.exact for span in cache.fusion.layout.chunks] == [0]


def test_heads_leave_with_their_documents(tiny_engine):
    engine = tiny_engine(stand_in=STAND_IN)
    engine.precompute([Chunk(text, "document") for text in TEXTS], progress=False)
    engine.generate("Who?", chunks=TEXTS, max_new_tokens=2)
    assert engine.evict("document") == 2 * len(TEXTS)
    left = [row.tags for row, _ in engine.runtime.store.entries()]
    assert len(left) == 2  # the prefix, and the stand-in after it


def test_stores_with_different_stand_ins_never_serve_each_other(tiny_engine, tmp_path):
    """In one folder, by either order, every engine computes its own and finds only that."""
    # Of short chunks, the heads that one stores are the chunks that another without a stand-in has.
    texts = [f"{text} " * 10 for text in TEXTS]
    settings = {"own": STAND_IN, "other": OTHER, "off": "none"}
    engines = {name: tiny_engine(stand_in=value) for name, value in settings.items()}
    assert len({engine.fingerprint for engine in engines.values()}) == 3
    for engine in engines.values():
        assert engine.precompute(texts, progress=False).computed == len(texts)
        assert engine.precompute(texts, progress=False).present == len(texts)
    for name, engine in engines.items():
        alone = tiny_engine(stand_in=settings[name], cache_dir=tmp_path / name)
        alone.precompute(texts, progress=False)
        for text in texts:
            (header, kv), (same, expected) = stored(engine, text), stored(alone, text)
            assert header == same
            assert torch.equal(kv.keys, expected.keys)
            assert torch.equal(kv.values, expected.values)
    keys = {stored(engine, text)[0].key for engine in engines.values() for text in texts}
    assert len(keys) == 3 * len(TEXTS)


def test_off_gives_the_keys_and_headers_of_before(tiny_engine):
    engine = tiny_engine(stand_in="none")
    engine.precompute(TEXTS, progress=False)
    planner = engine.runtime.planner
    for text in TEXTS:
        header, kv = stored(engine, text)
        assert kv is not None
        assert header.key == chunk_key(header.engine, planner.prefix_ids, planner.chunk_ids(text))
        fields = {"codec", "dtype", "engine", "first_layer", "key", "shape", "version"}
        assert set(json.loads(header.to_json())) == fields


def test_no_document_becomes_part_of_another(tiny_engine, tmp_path):
    """A chunk's key and KV are the same whatever else is in the store, the batch or the prompt."""
    secrets = ["A secret of somebody else, every evening.", "Another secret of the harbour."]
    alone = tiny_engine(stand_in=STAND_IN, cache_dir=tmp_path / "alone")
    alone.precompute(TEXTS[:1], progress=False)
    crowd = tiny_engine(stand_in=STAND_IN, cache_dir=tmp_path / "crowd")
    crowd.precompute(secrets, progress=False)
    crowd.generate("Who?", chunks=secrets, max_new_tokens=2)
    crowd.precompute([*secrets, *TEXTS], progress=False)
    asked = tiny_engine(stand_in=STAND_IN, cache_dir=tmp_path / "asked")
    asked.generate("Who?", chunks=[*secrets, TEXTS[0]], max_new_tokens=2)  # a miss among them
    header, kv = stored(alone, TEXTS[0])
    for engine in (crowd, asked):
        same, found = stored(engine, TEXTS[0])
        assert same == header
        # Computed in one batch with others: equal up to the rounding of its sums.
        torch.testing.assert_close(found.keys, kv.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.values, kv.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "room"), [("llama", 512), ("phi3-longrope", 256)])
def test_a_chunk_too_long_for_both_is_computed_without(tiny_engine, architecture, room):
    """Where a stand-in would push it beyond what positions are good for, it stays as it was."""
    engine, off = (tiny_engine(architecture, stand_in=each) for each in (STAND_IN, "none"))
    planner, library = engine.runtime.planner, engine.runtime.library
    left = room - len(planner.prefix_ids) - len(planner.stand_in_ids)
    fits, longer = (Segment("chunk", tuple([7] * n)) for n in (left, left + 1))
    assert library.context_ids(fits) == planner.prefix_ids + after(engine, STAND_IN)
    assert library.context_ids(longer) == planner.prefix_ids
    assert library.header(fits).stand_in == library.stand_in
    assert library.header(longer) == off.runtime.library.header(longer)
    assert list(library.store_all([longer, fits])) == [None, None]
    assert library.missing([longer, fits]) == []
    assert off.runtime.library.fetch(longer).hit


def test_the_stand_in_is_computed_once_for_all(tiny_engine, monkeypatch):
    texts = [f"{text} " * 10 for text in TEXTS]  # longer than their heads
    computed: Counter[tuple[int, ...]] = Counter()
    real = encoding_module.encode_chunks

    def counting(decoder, rotation, chunks, prefix):
        computed.update(map(tuple, chunks))
        return real(decoder, rotation, chunks, prefix)

    monkeypatch.setattr(encoding_module, "encode_chunks", counting)
    engine = tiny_engine(stand_in=STAND_IN)
    planner = engine.runtime.planner
    for text in texts:
        engine.precompute([text], progress=False)
    engine.generate("Who keeps the lamp?", chunks=[*texts, "One more."], max_new_tokens=2)
    assert computed[planner.prefix_ids + planner.stand_in_ids] == 1
    assert all(computed[planner.chunk_ids(text)] == 1 for text in texts)


def test_sparse_methods_look_from_behind_it_too(tiny_engine, monkeypatch):
    """A chunk's own queries are those that it has where its stored keys were computed."""
    engine = tiny_engine(stand_in=STAND_IN)
    planner, local = engine.runtime.planner, engine.runtime.local_queries
    asked: list[tuple[int, ...]] = []
    real = local.get

    def recording(n_local, layers, prefix, ids, kv):
        asked.append(prefix[0])
        assert prefix[1].n_tokens == len(prefix[0])
        return real(n_local, layers, prefix, ids, kv)

    monkeypatch.setattr(local, "get", recording)
    prompt = engine.plan("Who keeps the lamp?", TEXTS)
    assert engine.generate(prompt, selector="samkv", max_new_tokens=2).report.fused
    assert asked == [planner.prefix_ids + after(engine, STAND_IN)] * len(TEXTS)


@pytest.mark.parametrize("wrong", ["a passage on its own", "", ["text", "  "], [3]])
def test_what_is_no_stand_in_says_so_at_once(tiny_engine, wrong):
    with pytest.raises(ValueError, match="stand"):
        tiny_engine(stand_in=wrong)


def test_the_report_names_it(tiny_engine):
    engine, off = tiny_engine(stand_in=STAND_IN), tiny_engine(stand_in="none")
    report, without = (
        one.generate("Who?", chunks=TEXTS, max_new_tokens=2).report for one in (engine, off)
    )
    header, _ = stored(engine, TEXTS[0])
    assert report.stand_in == report.to_dict()["stand_in"] == header.stand_in != ""
    assert header.stand_in in str(report)
    assert without.stand_in == ""
    assert "stand-in" not in str(without)


@pytest.mark.real_model
def test_the_shipped_one_is_on_by_default(demo_engine):
    planner = demo_engine.runtime.planner
    assert planner.stand_in_ids == after(demo_engine, list(PASSAGES))
    lengths = [len(planner.chunk_ids(text)) for text in PASSAGES]
    assert len(lengths) == 4
    assert all(100 <= n <= 170 for n in lengths)
    assert demo_engine.runtime.library.stand_in
