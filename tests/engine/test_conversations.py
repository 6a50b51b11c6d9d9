"""Finished turns of a conversation: stored beside the answers, found by it alone, and fused."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from a3_engine import A3Engine, Chunk, Message
from a3_engine.chunks.archive import export_chunks
from a3_engine.conversations import TAG, Conversation
from a3_engine.fusion.selectors import make_selector
from a3_engine.method import Method
from a3_engine.model.cache_argument import with_cache
from a3_engine.report import FusionReport
from a3_engine.request import assemble
from tests.texts import LAMP, SHORE
from tests.tiny import CHATML, CONFIGS, STRICT, tiny_model, tiny_tokenizer

ASKED = ["Who keeps the lamp of the lighthouse, and who kept it before?", "Why so late?"]
SAID = "The keeper of the harbour does so, every evening and every night."
WHY = "Why does the lamp burn all night, and what is it that it burns?"


def talk(*texts: str, documents: str = LAMP) -> list[Message]:
    """Documents ahead of what user and assistant say in turns."""
    said = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [Message("system", ["Read: ", Chunk(documents)]), *said]


def told(engine: A3Engine, messages: list[Message], **options: object) -> FusionReport:
    """The report of a request, when its turns are stored."""
    report = engine.generate(messages, max_new_tokens=4, **options).report
    assert report.prompt_tokens == report.cached_tokens + report.created_tokens + (
        report.fresh_tokens
    )
    assert report.reused_turn_tokens + report.history_tokens <= report.cached_tokens
    if engine.runtime.turns is not None:
        engine.runtime.turns.settle()
    return report


def n_tokens(engine: A3Engine, *texts: str) -> int:
    """Of what user and assistant say in turns, with the template's words ahead of each."""
    plans = engine.runtime.planner
    ahead = [f"<|im_end|>\n<|im_start|>{role}\n" for role in ("user", "assistant")]
    return sum(
        len(plans.tokenize_text(text)) + len(plans.tokenize_template(ahead[i % 2], begins=False))
        for i, text in enumerate(texts)
    )


def turns_stored(engine: A3Engine) -> int:
    return sum(
        tag.startswith(TAG) for row, _ in engine.runtime.store.local.entries() for tag in row.tags
    )


def test_a_turn_is_read_wherever_it_stands_and_whatever_documents_come_before(tiny_engine):
    """From the third request on."""
    engine = tiny_engine()
    first, second = talk(ASKED[0]), talk(ASKED[0], SAID, WHY, documents=SHORE)
    assert told(engine, first).history_tokens == 0
    assert turns_stored(engine) == 0, "a single question is no conversation"
    assert told(engine, second).history_tokens == 0
    third = told(engine, talk(ASKED[0], SAID, WHY, SAID, ASKED[1]), ratio=0.0)
    assert third.history_tokens == n_tokens(engine, ASKED[0], SAID)
    assert third.fused
    assert third.hits == 1
    assert third.conversation.startswith(TAG)
    assert f"{third.history_tokens} of earlier turns" in str(third)
    assert engine.explain(third).tokens["turn"] == third.history_tokens


def test_an_answer_is_stored_as_it_was_said(tiny_engine):
    engine = tiny_engine()
    history = [ASKED[0], SAID, WHY]
    answer = engine.generate(talk(*history), max_new_tokens=40).text
    engine.runtime.turns.settle()
    longer = told(engine, talk(*history, answer, "And now?", documents=SHORE))
    assert longer.history_tokens == n_tokens(engine, *history, answer)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_at_ratio_one_turns_change_nothing(tiny_engine, architecture):
    engine = tiny_engine(architecture)
    messages = talk(ASKED[0], SAID, WHY, documents=SHORE)
    told(engine, messages)
    prompt = engine.plan(messages)
    assert sum(bool(segment.owner) for segment in prompt.segments) == 1
    method = Method(make_selector("mend", 1.0))
    cache = assemble(engine.runtime, prompt, method, 0, FusionReport()).cache
    ids, model = torch.tensor([prompt.ids]), engine.runtime.model
    with torch.inference_mode():
        fused = model(input_ids=ids, **with_cache(model, cache)).logits[0, -1]
        expected = model(ids).logits[0, -1]
    torch.testing.assert_close(fused, expected, rtol=2e-3, atol=2e-3)


def test_what_opens_a_prompt_is_exact_there(tiny_engine):
    """The system prompt is computed after the template's own words, which never change."""
    engine = tiny_engine()
    messages = [Message("system", f"{SAID} {WHY}"), *talk(ASKED[0], SAID, WHY)[1:]]
    told(engine, messages)
    prompt = engine.plan(messages)
    opening = prompt.layout(engine.runtime.planner.prefix_ids).chunks[0]
    assert opening.exact == opening.stop - opening.start > 0
    cache = assemble(
        engine.runtime, prompt, Method(make_selector("full_reuse")), 0, FusionReport()
    ).cache
    with torch.inference_mode():
        expected = engine.runtime.model(torch.tensor([prompt.ids])).past_key_values
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        keys, values = ours.shape.ours(*ours.stored())
        here = slice(opening.start, opening.stop)
        torch.testing.assert_close(keys[:, :, here], theirs.keys[:, :, here], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            values[:, :, here], theirs.values[:, :, here], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("template", [CHATML, STRICT], ids=["chatml", "strict"])
def test_token_ids_are_those_of_an_engine_that_keeps_no_turns(tiny_engine, tmp_path, template):
    def plan(**options: object) -> list[int]:
        engine = A3Engine.from_pretrained(
            tiny_model("llama"), tiny_tokenizer(template), cache_dir=tmp_path, **options
        )
        messages = talk(f"  {ASKED[0]} \n", f"\n{SAID}", WHY, SAID, "And?")[1:]
        told(engine, messages)
        told(engine, messages)
        ids = engine.plan(messages).ids
        engine.close()
        return ids

    assert plan() == plan(turns_kept_s=0)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {"conversation": "Bob"}),
        ({"conversation": "Ann"}, {"conversation": "Bob"}),
        ({"conversation": "Ann"}, {}),
    ],
    ids=str,
)
def test_another_conversation_never_finds_a_turn(tiny_engine, mine, theirs):
    """Also where it says the same to the letter."""
    engine = tiny_engine()
    messages = talk(ASKED[0], SAID, WHY)
    told(engine, messages, **mine)
    engine.runtime.prefix_cache.clear()
    assert told(engine, messages, **theirs).history_tokens == 0
    engine.runtime.prefix_cache.clear()
    assert told(engine, messages, **mine).history_tokens > 0


@pytest.mark.parametrize("place", [0, 2])
def test_without_a_name_a_turn_is_found_behind_the_same_words_alone(tiny_engine, place):
    engine = tiny_engine()
    history = [ASKED[0], SAID, WHY, SAID]
    told(engine, talk(*history, "And?"))
    others = [*history, "And?"]
    others[place] += " Or not?"
    found = told(engine, talk(*others, documents=SHORE)).history_tokens
    assert found == n_tokens(engine, *history[:place])


def test_a_name_finds_turns_whatever_was_cut_off_ahead_of_them(tiny_engine):
    """As memories do that keep the last messages."""
    engine = tiny_engine()
    told(engine, talk(ASKED[0], SAID, WHY, SAID, "And?"), conversation="Ann")
    cut = talk(WHY, SAID, "And then?", documents=SHORE)
    assert told(engine, cut, conversation="Ann").history_tokens == n_tokens(engine, WHY, SAID)


def test_a_text_of_a_conversation_is_not_found_in_plain_text(tiny_engine):
    engine = tiny_engine()
    told(engine, talk(ASKED[0], SAID, WHY))
    assert engine.generate(f"I read: {SAID} Is it so?", max_new_tokens=4).report.chunks == []
    assert not any(known for *_, known in engine.runtime.store.local.text_rows() if SAID in known)


def test_a_document_inside_a_turn_stays_a_document(tiny_engine):
    engine = tiny_engine()
    engine.precompute([LAMP, SHORE], progress=False)
    messages = talk(f"{SAID} Read: {LAMP}", SAID, WHY, documents=SHORE)
    told(engine, messages)
    report = told(engine, messages)
    assert report.hits == 2
    assert report.history_tokens == n_tokens(engine, f"{SAID} Read: ", SAID)


@pytest.mark.parametrize("how", ["tag", "age", "close", "command"])
def test_turns_go(tiny_engine, how):
    engine = tiny_engine()
    engine.precompute([LAMP, SHORE], progress=False)
    kept = engine.stats().entries
    messages = talk(ASKED[0], SAID, WHY)
    report = told(engine, messages)
    assert turns_stored(engine) == 2
    if how == "tag":
        assert engine.evict(report.conversation) == 2
    elif how == "age":
        engine.runtime.turns._kept_s = 0.0
        time.sleep(0.01)
        engine.runtime.turns.expire()
    elif how == "close":
        engine.close()
    else:
        engine.runtime.store.local.evict_unused(time.time() + 1)
    assert turns_stored(engine) == 0
    assert engine.stats().entries == (0 if how == "command" else engine.stats().entries)
    assert how == "command" or engine.stats().entries >= kept
    engine.runtime.prefix_cache.clear()
    assert told(engine, messages).history_tokens == 0


def test_turns_stay_on_this_machine(tiny_engine, tmp_path):
    """A shared store has none of them, nor has an archive unless it is asked for their tag."""
    shared = tmp_path / "shared"
    shared.mkdir()
    engine = tiny_engine(store=f"file://{shared}")
    report = told(engine, talk(ASKED[0], SAID, WHY))
    local = engine.runtime.store.local
    turns = {row.key for row, _ in local.entries() if report.conversation in row.tags}
    assert len(turns) == 2
    names = [path.name for path in shared.rglob("*") if path.is_file()]
    assert names
    assert not any(key in name for key in turns for name in names)
    every, own = tmp_path / "every.tar", tmp_path / "own.tar"
    assert export_chunks(local, every) == local.stats().entries - 2
    assert export_chunks(local, own, report.conversation) == 2


def test_what_is_old_is_not_read_before_it_is_removed(tiny_engine):
    engine = tiny_engine()
    messages = talk(ASKED[0], SAID, WHY)
    told(engine, messages)
    engine.runtime.prefix_cache.clear()
    engine.runtime.turns._kept_s = 0.0
    assert told(engine, messages).history_tokens == 0


def test_another_engines_turns_go_by_age_when_an_engine_starts(tiny_engine):
    engine = tiny_engine()
    told(engine, talk(ASKED[0], SAID, WHY))
    assert turns_stored(engine) > 0
    later = tiny_engine(turns_kept_s=1e-9)
    assert turns_stored(later) == 0
    assert not any(tag for _, tag in later.runtime.store.local._index.tags())


def test_off_means_off(tiny_engine):
    engine = tiny_engine(turns_kept_s=0)
    messages = talk(ASKED[0], SAID, WHY)
    told(engine, messages)
    engine.runtime.prefix_cache.clear()
    report = told(engine, messages)
    assert (report.history_tokens, report.conversation) == (0, "")
    assert turns_stored(engine) == 0
    with pytest.raises(ValueError, match="turns_kept_s"):
        tiny_engine(turns_kept_s=-1)


@pytest.mark.parametrize(
    "options", [{"selector": "full_prefill"}, {"quality": "exact"}, {"grammar": 'start: "yes"'}]
)
def test_what_is_no_turn_is_not_stored(tiny_engine, options):
    """Nothing of an exact request; with a grammar all but the answer."""
    engine = tiny_engine()
    told(engine, talk(ASKED[0], SAID, WHY), **options)
    assert turns_stored(engine) == (1 if "grammar" in options else 0)


def test_nothing_is_computed_while_somebody_waits_for_a_first_token(tiny_engine):
    engine = tiny_engine()
    turns = engine.runtime.turns
    prompt = engine.plan(talk(ASKED[0], SAID, WHY))
    with turns.until_first_token():
        turns.keep(prompt.turns)
        time.sleep(0.3)
        assert turns_stored(engine) == 0
    turns.settle()
    assert turns_stored(engine) == 1


def test_a_prompt_that_was_planned_is_named_already(tiny_engine):
    engine = tiny_engine()
    with pytest.raises(ValueError, match="planned already"):
        engine.generate(engine.plan("Who?"), conversation="Ann")


def test_turns_of_other_weights_are_not_read(tiny_engine):
    engine = tiny_engine()
    messages = talk(ASKED[0], SAID, WHY)
    told(engine, messages)
    with torch.no_grad():
        engine.runtime.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert told(engine, messages).history_tokens == 0
    assert told(engine, messages).cached_tokens > 0
    engine.close()
    assert turns_stored(engine) == 0


def test_turns_that_cannot_be_stored_are_computed_anew(tiny_engine, tmp_path, caplog):
    engine = tiny_engine(size_limit=1)  # not even one is kept
    messages = talk(ASKED[0], SAID, WHY)
    with caplog.at_level(logging.WARNING):
        told(engine, messages)
    engine.runtime.prefix_cache.clear()
    assert told(engine, messages).history_tokens == 0


def test_owners_follow_what_was_said_and_not_the_documents():
    def owners(*messages: Message) -> Iterator[str]:
        conversation = Conversation.of(messages)
        assert conversation is not None
        yield from conversation.owners

    said = talk(ASKED[0], SAID, WHY)
    other = [replace(said[0], content="Other documents."), *said[1:]]
    tools = [*said[:3], Message("tool", "What a tool found."), said[3]]
    assert list(owners(*said)) == list(owners(*other))
    assert [*owners(*tools)][4] == [*owners(*said)][3]
    assert len(set(owners(*said))) == 3  # what opens it belongs to its first words
