"""Turns of a conversation: what is literally repeated is kept, and nothing else is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from a3_engine import A3Engine, Chunk, Message
from a3_engine.fusion.prefix_cache import PrefixCache
from a3_engine.fusion.selectors import SELECTORS, make_selector
from a3_engine.model.cache_argument import with_cache
from a3_engine.segments import Prompt, Segment
from tests.engine.follow_ups import extended, follow_up_logits
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import CONFIGS

CHUNKS = ["Read: ", Chunk(LAMP), "\n\n", Chunk(SHORE), f"\n\n{ASK}"]
EXACT = ["full_prefill", "mend"]  # what a method leaves exact: all of it at ratio 1.0


def first_turn() -> list[Message]:
    return [Message("user", CHUNKS)]


def fresh(engine: A3Engine, text: str) -> Segment:
    return Segment("fresh", engine.runtime.planner.tokenize_text(text))


def chunk(engine: A3Engine, text: str) -> Segment:
    return Segment("chunk", engine.runtime.planner.chunk_ids(text), text)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("selector", EXACT)
def test_an_exact_turn_goes_on_as_a_full_prefill_would(tiny_engine, architecture, selector):
    """Also over a new chunk, with sliding windows, and on turns built on turns."""
    engine = tiny_engine(architecture)
    method = make_selector(selector, 1.0)
    prompt = engine.plan(first_turn())
    for question in ("Why?", "And who built it?"):
        engine.generate(prompt, selector=method, max_new_tokens=6)
        chunks = [chunk(engine, SHORE)] if question == "Why?" else []
        prompt = extended(engine, prompt, [*chunks, fresh(engine, question)])
        kept = follow_up_logits(engine, prompt, method, reuse=True)
        with torch.inference_mode():
            expected = engine.runtime.model(torch.tensor([prompt.ids])).logits[0, -1]
        torch.testing.assert_close(kept, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"full_prefill", "samkv"}))
def test_a_follow_up_sees_what_the_turn_before_saw(tiny_engine, selector):
    """One turn at a time over kept caches, or the same tokens fed to the first turn's cache."""
    engine = tiny_engine()
    method = make_selector(selector, None if selector == "full_reuse" else 0.3)
    prompt, cache = engine.prepare(first_turn(), selector=method)
    engine.generate(prompt, selector=method, max_new_tokens=6)
    longer = extended(engine, prompt, [fresh(engine, "Why so?")])
    model, n = engine.runtime.model, prompt.n_tokens
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt.ids]), **with_cache(model, cache))
        expected = model(torch.tensor([longer.ids[n:]]), **with_cache(model, cache)).logits[0, -1]
    kept = follow_up_logits(engine, longer, method, reuse=True)
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method", [{"selector": "samkv", "ratio": 0.5}, {"compression": "snapkv"}], ids=str
)
def test_a_cache_that_leaves_tokens_out_serves_its_own_request_alone(tiny_engine, method):
    engine = tiny_engine()
    first = engine.generate(first_turn(), max_new_tokens=6, **method)
    longer = [*first_turn(), Message("assistant", first.text), Message("user", "Why?")]
    assert engine.generate(longer, max_new_tokens=6, **method).report.reused_turn_tokens == 0
    assert not engine.runtime.prefix_cache._prefixes


def test_a_conversation_reports_what_it_kept(tiny_engine):
    """The second turn keeps the first; the third fetches only the chunk that is new."""
    engine = tiny_engine()
    prompt = engine.plan(first_turn())
    first = engine.generate(prompt, max_new_tokens=6).report
    assert first.reused_turn_tokens == 0
    longer = extended(engine, prompt, [fresh(engine, "Why?")])
    second = engine.generate(longer, max_new_tokens=6).report
    assert second.reused_turn_tokens == prompt.n_tokens + first.generated_tokens - 1
    assert second.fresh_tokens == longer.n_tokens - second.reused_turn_tokens
    assert (second.hits, second.misses, second.bytes_read) == (2, 0, 0)
    assert second.recomputed_tokens == 0
    assert str(second.reused_turn_tokens) in str(second)

    new = "A new keeper came in the spring, and painted the tower white."
    longest = extended(engine, longer, [chunk(engine, new), fresh(engine, "Who?")])
    third = engine.generate(longest, max_new_tokens=6).report
    assert third.reused_turn_tokens == longer.n_tokens + second.generated_tokens - 1
    assert (third.hits, third.misses) == (2, 1)
    assert third.cached_tokens + third.created_tokens + third.fresh_tokens == third.prompt_tokens
    assert third.created_tokens == len(chunk(engine, new).ids)
    assert 0 < third.recomputed_tokens <= third.created_tokens


@pytest.mark.parametrize(
    "change",
    ["same prompt", "other answer", "other start", "shorter", "ratio", "selector", "evicted"],
)
def test_whatever_else_changes_nothing_is_kept(tiny_engine, change):
    engine = tiny_engine()
    prompt = engine.plan(first_turn())
    engine.generate(prompt, ratio=0.3, max_new_tokens=6)
    request = extended(engine, prompt, [fresh(engine, "Why?")])
    segments, options = list(request.segments), {"ratio": 0.3}
    if change == "same prompt":
        request = prompt
    elif change == "other answer":
        other = (segments[-2].ids[0] + 1, *segments[-2].ids[1:])
        segments[-2] = replace(segments[-2], ids=other)
    elif change == "other start":
        segments[0] = replace(segments[0], kind="fresh", ids=(*segments[0].ids, 7))
    elif change == "shorter":
        segments = [*segments[:-3], segments[-1]]
    elif change == "ratio":
        options = {"ratio": 0.31}
    elif change == "selector":
        options = {"ratio": 0.3, "selector": "question_attention"}
    else:
        engine.evict("no such document")
    if change != "same prompt":
        request = Prompt(tuple(segments), len(segments) - 1)
    report = engine.generate(request, max_new_tokens=4, **options).report
    assert report.reused_turn_tokens == 0
    again = tiny_engine().generate(request, max_new_tokens=4, **options)
    assert again.text == engine.generate(request, max_new_tokens=4, **options).text


def test_an_answer_cut_by_a_stop_string_is_kept_up_to_the_cut(tiny_engine):
    engine = tiny_engine()
    prompt = engine.plan(first_turn())
    engine.generate(prompt, max_new_tokens=6)
    segments = list(extended(engine, prompt, [fresh(engine, "Why?")]).segments)
    segments[-2] = replace(segments[-2], ids=segments[-2].ids[:2])
    cut = Prompt(tuple(segments), len(segments) - 1)
    report = engine.generate(cut, max_new_tokens=4).report
    same = 2 + (segments[-1].ids[:1] == segments[-2].ids[2:3])
    assert report.reused_turn_tokens == prompt.n_tokens + same


def test_a_conversation_without_documents_is_kept_too(tiny_engine):
    engine = tiny_engine()
    prompt = engine.plan("Tell me of the harbour and its keeper.")
    engine.generate(prompt, max_new_tokens=6)
    longer = extended(engine, prompt, [fresh(engine, "Why?")])
    kept = engine.generate(longer, max_new_tokens=8)
    assert kept.report.reused_turn_tokens > prompt.n_tokens
    assert kept.report.fallback_reason
    assert kept.text == tiny_engine().generate(longer, max_new_tokens=8).text


def test_closing_forgets_and_a_late_request_keeps_nothing(tiny_engine):
    engine = tiny_engine()
    prompt = engine.plan(first_turn())
    engine.generate(prompt, max_new_tokens=6)
    longer = extended(engine, prompt, [fresh(engine, "Why?")])
    turns = engine.runtime.prefix_cache
    engine.close()
    assert turns.find(longer.ids, engine.selector) == (None, 0)
    assert engine.generate(longer, max_new_tokens=2).report.reused_turn_tokens == 0


def kept(turns: PrefixCache, ids: list[int], tokens: int = 10) -> None:
    states = (torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))
    turns.put(ids, 2, make_selector("mend"), DynamicCache([states]))


def test_turns_are_bounded_by_number_and_by_bytes():
    """The one that was used longest ago goes first; one too large alone is not kept."""
    method = make_selector("mend")
    each = 2 * 10 * 4 * 4
    turns = PrefixCache(max_prefixes=3, max_bytes=2 * each)
    for start in (1, 2):
        kept(turns, [start, 0, 5, 6])
    assert turns.find([1, 0, 5, 9], method)[1] == 3
    kept(turns, [3, 0, 5, 6])
    assert turns.find([2, 0, 5, 9], method) == (None, 0)
    assert turns.find([1, 0, 5, 9], method)[1] == turns.find([3, 0, 5, 9], method)[1] == 3
    kept(turns, [4, 0, 5, 6], tokens=100)
    assert turns.find([4, 0, 5, 9], method) == (None, 0)
    few = PrefixCache(max_prefixes=1)
    for start in (1, 2):
        kept(few, [start, 0, 5, 6])
    assert few.find([1, 0, 5, 9], method) == (None, 0)


def test_conversations_in_threads_do_not_disturb_each_other(tiny_engine):
    """Each answers as it does alone, whatever the others keep and push out meanwhile.

    All is recomputed, so that a turn which was pushed out and is fused again is the same.
    """

    def talk(name: str) -> tuple[list[Prompt], list[str]]:
        engine = tiny_engine(ratio=1.0)
        engine.precompute([LAMP, SHORE], progress=False)
        prompts = [engine.plan([Message("user", [f"I am {name}. ", *CHUNKS])])]
        texts = []
        for question in ("Why?", "And then?", "Who?"):
            answer = engine.generate(prompts[-1], max_new_tokens=6)
            assert (answer.report.reused_turn_tokens > 0) == (len(texts) > 0)
            texts.append(answer.text)
            prompts.append(extended(engine, prompts[-1], [fresh(engine, question)]))
        engine.close()
        return prompts[:-1], texts

    alone = [talk(name) for name in ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")]
    engine = tiny_engine(ratio=1.0)

    def again(prompts: list[Prompt]) -> tuple[list[str], int]:
        answers = [engine.generate(prompt, max_new_tokens=6) for prompt in prompts]
        return [a.text for a in answers], sum(a.report.reused_turn_tokens for a in answers)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(again, [prompts for prompts, _ in alone]))
    assert [texts for texts, _ in together] == [texts for _, texts in alone]
    assert sum(reused for _, reused in together) > 0
