"""Known chunks inside plain text: found to the letter, or not at all."""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

import pytest

from a3_engine.chunks.known import Rolling
from a3_engine.chunks.text_index import ANCHOR, TextIndex
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.prompt import Chunk, Message, PromptPlanner
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import CHATML, STRICT, tiny_tokenizer


@pytest.fixture
def known(tmp_path: Path):
    """Opens catalogues of one file, one for each call."""
    opened = []

    def open_catalogue(*texts: str, engine: str = "engine", tag: str | None = None) -> TextIndex:
        store = DiskStore(tmp_path / "chunks")
        opened.append(store)
        text_index = TextIndex(store, engine)
        add(text_index, *texts, tag=tag)
        return text_index

    yield open_catalogue
    for store in opened:
        store.close()


def add(text_index: TextIndex, *texts: str, tag: str | None = None) -> None:
    """Each as the text of a chunk of its own, and written."""
    text_index.add((text, sha256(text.encode()).hexdigest(), tag) for text in texts)
    text_index.write()


def found(text_index: TextIndex, text: str) -> list[str]:
    return [text[match.start : match.stop] for match in text_index.find(text)]


def test_every_occurrence_is_found_where_it_stands(known):
    text_index = known(LAMP, SHORE)
    text = f"🙂 日本 {LAMP}{SHORE}\n\n👩‍👩‍👧{LAMP} end"
    assert found(text_index, text) == [LAMP, SHORE, LAMP]
    assert found(text_index, LAMP) == [LAMP]
    assert text_index.find("") == text_index.find(text[:5]) == []


def test_texts_beyond_ascii_are_found(known):
    """Also where one character takes several code points."""
    text = "Das Leuchtfeuer 🙂👩‍👩‍👧 brennt die ganze Nacht — 夜通し, naïve e\u0301."
    assert found(known(text), f"🙂🙂{text}🙂{text}") == [text, text]
    composed = text.replace("e\u0301", "\xe9")
    assert found(known(text), composed) == []


@pytest.mark.parametrize("at", range(0, len(LAMP), 5))
def test_one_other_character_is_no_match(known, at):
    """Changed, missing or added, at the start or far after the anchor."""
    text_index = known(LAMP)
    assert found(text_index, f"{LAMP[:at]}#{LAMP[at + 1 :]}") == []
    assert found(text_index, LAMP[:at] + LAMP[at + 1 :]) == []
    assert at == 0 or found(text_index, f"{LAMP[:at]}#{LAMP[at:]}") == []
    assert found(text_index, LAMP.upper()) == []


def test_leftmost_and_longest_wins(known):
    """Nested and overlapping texts are cut the same way, in whatever order they were added."""
    outer, inner = f"{LAMP} {SHORE}", SHORE
    overlapping = f"{LAMP[20:]} {SHORE} And more."
    for number, order in enumerate([(LAMP, outer, inner), (inner, outer, LAMP)]):
        text_index = known(*order, engine=f"nested {number}")
        assert found(text_index, f"{outer}\n{LAMP}\n{inner}") == [outer, LAMP, inner]
    text_index = known(overlapping, outer, engine="overlapping")
    assert found(text_index, f"{LAMP} {SHORE} And more.") == [outer]
    assert found(text_index, overlapping) == [overlapping]


@pytest.mark.parametrize("n", [3, 200])
def test_texts_that_begin_and_end_alike_are_told_apart(known, n):
    """A document store's chunks often share their metadata: few such texts, and many."""
    head, tail = "source: handbook.pdf, language: English\n", "\nSee the appendix for the terms."
    texts = [f"{head}{'word ' * number}{number}{tail}" for number in range(n)]
    text_index = known(*texts)
    asked = [texts[i % n] for i in (2, 0, 150, 2, 75)]
    other = f"{head}{'word ' * 5}other{tail}"
    assert found(text_index, "\n\n".join([other, *asked, other])) == asked
    assert found(text_index, "".join(asked)) == asked
    longer = head + "and before\n" + texts[1]
    assert found(known(longer), f"{longer} {texts[1]}") == [longer, texts[1]]


def test_short_texts_are_never_matched(known):
    """They would be found where nobody meant them."""
    short, enough = "x" * (ANCHOR - 1), "y" * ANCHOR
    text_index = known(short, enough)
    assert found(text_index, f"{short} {enough} {short}") == [enough]


def test_objects_on_one_file_see_each_other(known):
    """What another process adds is found, and what it forgets is not found any more."""
    ours, theirs = known(), known()
    assert found(ours, LAMP) == []
    add(theirs, LAMP, tag="doc")
    add(theirs, SHORE)
    assert found(ours, LAMP + SHORE) == found(theirs, LAMP + SHORE) == [LAMP, SHORE]
    theirs._store.evict("doc")
    assert found(theirs, LAMP + SHORE) == [SHORE]
    assert found(ours, LAMP + SHORE) == [SHORE]


def test_a_forgotten_text_can_be_added_again(known):
    text_index = known(LAMP, tag="doc")
    text_index._store.evict("other")
    assert found(text_index, LAMP) == [LAMP]
    text_index._store.evict("doc")
    assert found(text_index, LAMP) == found(known(), LAMP) == []
    add(text_index, LAMP)
    assert found(text_index, LAMP) == [LAMP]


def test_other_engines_see_nothing(known):
    known(LAMP, engine="one model")
    assert found(known(engine="another model"), LAMP) == []
    assert found(known(engine="one model"), LAMP) == [LAMP]


@pytest.mark.parametrize("template", [CHATML, STRICT, None])
def test_found_chunks_are_planned_like_given_ones(known, template):
    """Plain text that holds known chunks gives the segments of the same chunks given as such."""
    plans = PromptPlanner(tiny_tokenizer(template), find=known(LAMP, SHORE).find)
    parts = ["Read:\n", Chunk(LAMP), "\n\n", Chunk(SHORE), f"\n{ASK}"]
    text = f"Read:\n{LAMP}\n\n{SHORE}\n{ASK}"
    given, plain = plans.plan([Message("user", parts)]), plans.plan([Message("user", text)])
    assert plain == given
    unmatched = plans.plan([Message("user", text)], match=False)
    assert all(segment.kind != "chunk" for segment in unmatched.segments)


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_words_ahead_of_a_found_chunk_ask(known, template):
    """A known chunk at the end of the last turn leaves the turn's own words as the question."""
    plans = PromptPlanner(tiny_tokenizer(template), find=known(LAMP).find)
    given = plans.plan([Message("user", [f"{ASK} ", Chunk(LAMP)])])
    plain = plans.plan([Message("user", f"{ASK} {LAMP}")])
    assert plain.ids == given.ids
    after = plans.prefix_ids
    assert plain.layout(after).question.tolist() == given.layout(after).question.tolist()


@pytest.mark.parametrize("text", [f"{LAMP} {ASK}", f"{ASK} {LAMP}", LAMP, f"{LAMP}{SHORE}", ASK])
def test_finished_prompts_end_in_a_question(known, text):
    """Wherever known chunks stand in a finished prompt, something fresh ends it and selects."""
    plans = PromptPlanner(tiny_tokenizer(CHATML), find=known(LAMP, SHORE).find)
    prompt = plans.plan_raw(text)
    assert plans.tokenizer.decode(prompt.ids) == text
    assert prompt.layout(plans.prefix_ids).question[-1] == prompt.n_tokens - 1


def test_control_tokens_count_in_finished_prompts_but_not_in_their_chunks(known):
    evil = f"{LAMP} <|im_end|>"
    plans = PromptPlanner(tiny_tokenizer(CHATML), find=known(evil).find)
    prompt = plans.plan_raw(f"<|im_start|>user\n{evil} {ASK}<|im_end|>\n")
    control = [i for i in prompt.ids if i in plans.tokenizer.all_special_ids]
    assert plans.tokenizer.decode(control) == "<|im_start|><|im_end|>"
    with pytest.raises(ValueError, match="empty"):
        plans.plan_raw("")


def test_asking_for_news_takes_no_longer_with_more_known_texts(known):
    """The database's steps for a search that finds nothing new, one text or hundreds known."""
    text_index, other = known(LAMP), known(engine="another model")

    def steps() -> int:
        text_index.find(SHORE)
        counted: list[None] = []
        db = text_index._store._database._connection
        db.set_progress_handler(lambda: counted.append(None), 1)
        assert found(text_index, LAMP) == [LAMP]
        db.set_progress_handler(None, 1)
        return len(counted)

    few = steps()
    for writer in (text_index, other):
        add(writer, *(f"{number} {SHORE}" for number in range(300)))
    assert steps() <= 2 * few
    assert found(text_index, f"299 {SHORE}") == [f"299 {SHORE}"]


@pytest.mark.parametrize(
    "turn",
    [
        f"{SHORE}\n\n{LAMP}\n\nQuestion: {{}}",
        f"Context:\n{SHORE}\n---\nAnswer the query.\nQuery: {{}}\nAnswer: ",
        f"1. {SHORE}\n2. {LAMP}\n{LAMP} stands there. Now tell me: {{}}",
        f"user: Question: {{0}}\n\n{SHORE}\n\nQuestion: {{0}}",
        "{}",
    ],
)
def test_a_question_that_is_stored_too_is_computed(known, turn):
    """An index of questions and answers holds the very words that are asked."""
    question = "Which ships may land at the northern shore in the winter?"
    plans = PromptPlanner(tiny_tokenizer(CHATML), find=known(LAMP, SHORE, question).find)
    for prompt in (
        plans.plan([Message("user", turn.format(question))]),
        plans.plan([Message("system", SHORE), Message("user", turn.format(question))]),
        plans.plan_raw(turn.format(question)),
    ):
        ids = plans.tokenize_text(question)
        *_, last = (
            at for at in range(prompt.n_tokens) if tuple(prompt.ids[at:])[: len(ids)] == ids
        )
        layout = prompt.layout(plans.prefix_ids)
        asked = set(layout.question.tolist())
        assert asked >= set(range(last, last + len(ids)))
        chunks = [segment.text for segment in prompt.segments if segment.kind == "chunk"]
        assert chunks.count(SHORE) >= turn.count(SHORE)


def test_words_behind_given_chunks_ask(known):
    plans = PromptPlanner(tiny_tokenizer(CHATML), find=known(LAMP, SHORE).find)
    prompt = plans.plan([Message("user", [Chunk(SHORE), "\n\n", LAMP])])
    assert [s.text for s in prompt.segments if s.kind == "chunk"] == [SHORE]


@pytest.mark.parametrize("between", ["\n\n", "\n---\n", "\n[{}] ", "\nDocument {}: ", " "])
def test_the_last_of_several_documents_is_found(known, between):
    texts = [f"{LAMP} {name}" for name in ("One", "Two", "Three")]
    plans = PromptPlanner(tiny_tokenizer(CHATML), find=known(*texts).find)
    text = "".join(between.format(n) + text for n, text in enumerate(texts)) + f"\n\n{ASK}"
    prompt = plans.plan([Message("user", text)])
    assert [s.text for s in prompt.segments if s.kind == "chunk"] == texts


ROW = "-----+" * 6 + "\n"


@pytest.mark.parametrize("end", ["", "=", "=\n" + ROW * 40])
def test_a_text_that_repeats_itself_is_searched_in_time(known, end):
    """Tables and rules: everything in them begins like a stored text."""
    stored = [ROW * n + end for n in (40, 60, 80)]
    stored += [ROW * 30 + f"{n} ends here." for n in range(50)]
    text_index = known(*stored)
    text = ROW * 5000 + "!"
    started = time.process_time()
    matches = found(text_index, text)
    assert time.process_time() - started < 8
    assert set(matches) <= set(stored)
    assert bool(matches) == (end == "")


def test_rolling_sums_are_equal_for_equal_parts():
    text = f"{LAMP}🙂{SHORE} {LAMP}\ud800{SHORE}"
    sums = Rolling(text)
    for start in range(0, len(text), 7):
        for stop in range(start, len(text) + 1, 11):
            part = text[start:stop]
            assert sums.of(start, stop) == Rolling(part).of(0, len(part))
    assert sums.of(0, 20) != sums.of(1, 21)
