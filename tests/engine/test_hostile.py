"""Whatever a request is, it is answered or refused in one sentence, and so is the next one."""

from __future__ import annotations

import itertools
import logging
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_engine import A3Engine, A3Error, Chunk, ContextOverflowError, Message
from a3_engine.decoding.sampling import Sampling
from a3_engine.decoding.text_emitter import TextEmitter
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import tiny_tokenizer

REFUSALS = (TypeError, ValueError, A3Error)
ODD = [
    None,
    5,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    True,
    "",
    "x",
    b"bytes",
    [],
    [None],
    [5],
    [[]],
    {},
    {"role": "user"},
    {"role": None, "content": "x"},
    {"role": "user", "content": 5},
    {"role": "user", "content": [{"type": "text"}]},
    object(),
    lambda: None,
    torch.tensor([1.0, 2.0]),
    np.array(3),
    iter([]),
    "\ud835\x00\u202e",
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from tests.tiny import tiny_model

    folder = tmp_path_factory.mktemp("hostile")
    engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=folder)
    yield engine
    engine.close()


def reference(engine: A3Engine) -> str:
    return engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=4).text


def calls(engine: A3Engine):
    names = ["selector", "ratio", "compression", "keep", *Sampling.__dataclass_fields__, "nothing"]
    for odd in ODD:
        yield lambda odd=odd: engine.generate(odd, max_new_tokens=2)
        yield lambda odd=odd: engine.generate([odd], max_new_tokens=2)
        yield lambda odd=odd: engine.generate(ASK, chunks=odd, max_new_tokens=2)
        yield lambda odd=odd: engine.generate(ASK, chunks=[odd], max_new_tokens=2)
        yield lambda odd=odd: engine.precompute(odd, progress=False)
        yield lambda odd=odd: engine.precompute([odd, LAMP], progress=False)
        yield lambda odd=odd: engine.remember([odd])
        yield lambda odd=odd: engine.evict(odd)
        yield lambda odd=odd: Chunk(LAMP, odd)
        for name in names:
            options = {"max_new_tokens": 2, name: odd}
            yield lambda options=options: engine.generate(ASK, chunks=[LAMP], **options)


def test_hostile_inputs_raise_nothing_foreign(engine):
    """And each refusal is one sentence that says what is expected."""
    before, count, said = reference(engine), 0, []
    for call in calls(engine):
        count += 1
        try:
            call()
        except REFUSALS as error:
            said.append(str(error))
    assert count > 300
    assert [text for text in said if "object has no attribute" in text] == []
    assert all(10 < len(text) < 400 for text in said)
    assert reference(engine) == before


def test_messages_may_be_plain_values(engine):
    turn = {"role": "user", "content": f"{LAMP} {ASK}"}
    expected = engine.generate([Message(**turn)], max_new_tokens=3).text
    for request in (turn, [turn], Message(**turn), (turn,), iter([turn])):
        assert engine.generate(request, max_new_tokens=3).text == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, "5", True])
def test_a_length_that_is_none_is_refused(engine, value):
    with pytest.raises((TypeError, ValueError), match="max_new_tokens"):
        engine.generate(ASK, max_new_tokens=value)


def test_numbers_are_numbers_and_none_is_not_given(engine):
    plain = engine.generate(ASK, max_new_tokens=3, temperature=1.0, seed=3).text
    for one in (1, np.float32(1), np.int64(1), torch.tensor(1.0)):
        drawn = engine.generate(
            ASK, max_new_tokens=np.int64(3), temperature=one, seed=3.0, top_p=None, stop=None
        )
        assert drawn.text == plain
    assert Sampling(stop="x") == Sampling(stop=["x"]) == Sampling(stop=("x",))
    assert Sampling(temperature=None, max_new_tokens=None) == Sampling()


def test_halves_of_characters_are_replaced_alike_in_chunks_and_prompts(engine, caplog):
    """As PDF readers leave them; the other chunks of a batch are kept."""
    broken = f"{LAMP} \ud835 and \udc00\ud800 more."
    with caplog.at_level(logging.WARNING):
        assert (
            engine.precompute([Chunk(broken, "\ud835"), f"2. {LAMP}"], progress=False).computed == 2
        )
        report = engine.generate(f"{broken} {ASK} \udfff", max_new_tokens=2).report
        assert report.hits == 1
        assert "\N{REPLACEMENT CHARACTER}" in report.chunks[0].text
    assert engine.evict("\ud835") == 1
    whole = f"{LAMP} 𝒳 🙂"
    assert Chunk(whole).text == whole


@given(st.lists(st.text(alphabet="ab", max_size=6), max_size=4), st.text(alphabet="abc"))
@settings(max_examples=200, deadline=None)
def test_stop_strings_end_an_answer_before_the_first(stops, text):
    """Whatever they are; piece by piece as in one."""

    class Letters:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    pieces: list[str] = []
    emitter = TextEmitter(Letters(), pieces.append, stops)
    for letter in text:
        if not emitter.stopped:
            emitter.put(ord(letter))
    emitter.end()
    # The earliest end of any of them decides what has come by then.
    ends = [at + len(s) for s in stops if s for at in [text.find(s)] if at >= 0]
    seen = text[: min(ends)] if ends else text
    starts = [at for at in (seen.find(s) for s in stops if s) if at >= 0]
    assert "".join(pieces) == (seen[: min(starts)] if starts else seen)


def test_many_long_stop_strings_cost_little():
    class Letters:
        def decode(self, ids, **_):
            return "a" * len(ids)

    stops = ["a" * 1999 + chr(0x4E00 + number) for number in range(2000)]
    emitter = TextEmitter(Letters(), lambda piece: None, stops)
    started = time.process_time()
    for _ in range(60):
        emitter.put(0)
    assert time.process_time() - started < 2


def test_texts_of_every_script_are_answered(engine):
    texts = ["", " ", "\0", "\ufeff", "\u202e", "🙂👩‍👩‍👧", "日本語", "\x1b[31m", "a" * 100]
    before = reference(engine)
    for text in map("".join, itertools.product(texts, repeat=2)):
        message = Message("user", text)
        if text.strip():
            engine.generate([message], max_new_tokens=1)
        else:
            with pytest.raises(ValueError, match="empty"):
                engine.generate([message], max_new_tokens=1)
    assert reference(engine) == before


def test_letters_alone_say_that_a_prompt_is_too_long(engine):
    """Before a token is made of them."""
    started = time.process_time()
    for request in ({"chunks": [LAMP] * 100_000}, {"chunks": ["x" * 10**7]}):
        with pytest.raises(ContextOverflowError, match="characters"):
            engine.generate(ASK, max_new_tokens=2, **request)
    with pytest.raises(ContextOverflowError, match="characters"):
        engine.generate("y" * 10**7, max_new_tokens=2)
    assert time.process_time() - started < 5
