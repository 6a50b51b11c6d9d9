"""Tasks: what is generated can be found again, and scores reward the right answer alone."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from a3_engine.evaluation.chunking import Chunker
from a3_engine.evaluation.datasets import read_examples
from a3_engine.evaluation.metrics import recall, rouge_l
from a3_engine.evaluation.run import evaluate
from a3_engine.evaluation.tasks import TASKS
from a3_engine.evaluation.tasks.base import Source
from a3_engine.evaluation.tasks.needle import DEPTHS, NEEDLES
from a3_engine.method import make_method
from a3_engine.prompt import PromptPlanner
from tests.tiny import tiny_tokenizer

METHODS = [make_method("full_reuse")]
LENGTHS = {"needle": (512,), "ruler": (1800,), "summarize": ()}
TEXT = "\n\n".join(
    f"Chapter {n} begins here. Rain fell on the {n}th day! Was it cold? The crew said nothing."
    for n in range(40)
)


@pytest.fixture(scope="module")
def chunker():
    return Chunker(PromptPlanner(tiny_tokenizer()), chunk_tokens=256, window=4096)


def words(example):
    return " ".join(" ".join(passage.text for passage in example.passages).split())


def longbench(**fields):
    row = {"input": "Who?", "context": TEXT, "answers": ["Ada"], "length": 9, "dataset": "qasper"}
    return row | {"language": "en", "all_classes": None, "_id": "1f"} | fields


def written(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Chunks and LongBench


def test_chunks_hold_the_text_within_their_limit(chunker):
    chunks = chunker.cut(TEXT + "\n" + "x" * 500)
    assert "".join("".join(chunks).split()) == "".join((TEXT + "x" * 500).split())
    assert all(chunker.count(chunk) <= 256 for chunk in chunks)


def test_chunks_end_where_sentences_do(chunker):
    assert all(chunk[-1] in ".!?" for chunk in chunker.cut(TEXT))


def test_longbench_rows_become_chunks(chunker, tmp_path):
    (example,) = read_examples(written(tmp_path, longbench()), chunker=chunker)
    assert (example.id, example.dataset, example.question) == ("1f", "qasper", "Who?")
    assert words(example) == " ".join(TEXT.split())
    assert len(example.passages) > 5


def test_a_context_beyond_the_window_loses_its_middle(tmp_path):
    small = Chunker(PromptPlanner(tiny_tokenizer()), chunk_tokens=64, window=512)
    (example,) = read_examples(written(tmp_path, longbench()), chunker=small)
    kept, whole = words(example), " ".join(TEXT.split())
    assert 200 < sum(small.count(passage.text) for passage in example.passages) < 512
    assert kept[:100] == whole[:100]
    assert kept[-100:] == whole[-100:]


def test_finished_prompts_are_taken_apart(chunker, tmp_path):
    head = "Answer from the passages.\n\nThe following are given passages."
    ask = "Answer from the passages.\n\nQuestion: Who keeps it?\nAnswer:"
    row = {"id": "m", "dataset": "d", "prompt": f"{head}\n{TEXT}\n\n{ask}", "answers": ["Ada"]}
    (example,) = read_examples(written(tmp_path, row), chunker=chunker)
    assert (example.head, example.ask, example.question) == (head, ask, "Who keeps it?")
    assert words(example) == " ".join(TEXT.split())


# Needles


@pytest.fixture(scope="module")
def needles(chunker):
    return TASKS["needle"].datasets(Source(chunker, lengths=(1024, 2048), samples=len(NEEDLES)))


def test_the_needle_stands_whole_at_its_depth(needles, chunker):
    for example in (example for dataset in needles for example in dataset):
        (needle,) = (n for n in NEEDLES if n.question == example.question)
        (place,) = (i for i, p in enumerate(example.passages) if needle.sentence in p.text)
        context = words(example)
        assert 0.7 * example.labels["length"] < chunker.count(context) <= example.labels["length"]
        before, after = context.split(needle.sentence)
        depth = len(before) / (len(before) + len(after))
        longest = max(len(sentence) for sentence in re.split(r"(?<=[.!?]) ", before + after))
        assert abs(depth - example.labels["depth"] / 100) <= longest / len(before + after)
        assert place == 0 or example.labels["depth"] > 0


def test_only_the_needle_holds_its_facts(needles):
    for example in needles[-1]:
        (needle,) = (n for n in NEEDLES if n.question == example.question)
        assert recall(needle.answer, example.facts) == 1.0
        assert recall(words(example).replace(needle.sentence, ""), example.facts) == 0.0
        assert needle.sentence == f"{needle.lead} {needle.answer}."


def test_every_depth_comes_before_the_next_needle(needles):
    first = needles[0][: len(DEPTHS)]
    assert [example.labels["depth"] for example in first] == list(DEPTHS)
    assert len({example.question for example in first}) == 1


def test_needles_hide_in_any_text(chunker, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    source = Source(chunker, text=path, lengths=(256,))
    assert all("Chapter" in words(example) for example in TASKS["needle"].datasets(source)[0])
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"text\.txt has no text"):
        TASKS["needle"].datasets(source)


# RULER: the answers are read again from the context, by other means than they were written.


def asked_needles(context, question):
    kind = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{7}"
    pairs = re.findall(rf"special magic \w+ for (\S+) is: ({kind})\.", context)
    keys = re.search(r"for (.+) mentioned", question)[1].replace(", and ", ", ").split(", ")
    return [value for key in keys for found, value in pairs if found == key]


def asked_variables(context, question):
    value = re.search(r"value (\d+)", question)[1]
    holders = {value}
    for name, _, held in re.findall(r"VAR (\w+) = (VAR )?(\w+)", context.rpartition("Memorize")[2]):
        holders |= {name} if held in holders else set()
    return holders - {value}


def asked_common(context, question):
    listed = re.findall(r"\d+\. (\S+)", context.rpartition("Memorize")[2])
    return [word for word, _ in Counter(listed).most_common(10)]


def asked_frequent(context, question):
    coded = re.findall(r"\b[a-z]{6}\b", context.partition("coded words. ")[2])
    return [word for word, _ in Counter(coded).most_common(3)]


@pytest.fixture(scope="module")
def ruler(chunker):
    return TASKS["ruler"].datasets(Source(chunker, lengths=(2048,), samples=2))


def test_rulers_answers_can_be_derived_from_its_contexts(ruler):
    special = {"vt": asked_variables, "cwe": asked_common, "fwe": asked_frequent}
    assert len(ruler) == 11
    for dataset in ruler:
        assert dataset[0].facts != dataset[1].facts
        for example in dataset:
            name = example.dataset.rpartition("_")[0]
            derive = special.get(name, asked_needles)
            assert sorted(derive(words(example), example.question)) == sorted(example.facts), name


def test_ruler_fills_its_length(ruler, chunker):
    for dataset in ruler:
        for example in dataset:
            parts = [words(example), example.ask, example.begin]
            size = chunker.count("\n".join(parts)) + example.answer_tokens
            assert 0.7 * 2048 < size <= 2048 + len(example.passages), example.dataset


def test_ruler_asks_for_as_many_as_its_kinds_say(ruler):
    counts = {dataset[0].dataset: len(dataset[0].facts) for dataset in ruler}
    assert counts == {
        **dict.fromkeys((f"niah_single_{n}_2048" for n in (1, 2, 3)), 1),
        **dict.fromkeys((f"niah_multikey_{n}_2048" for n in (1, 2, 3)), 1),
        "niah_multivalue_2048": 4,
        "niah_multiquery_2048": 4,
        "vt_2048": 5,
        "cwe_2048": 10,
        "fwe_2048": 3,
    }


@pytest.mark.parametrize("task", ["needle", "ruler"])
def test_a_seed_gives_the_same_examples_again(task, chunker):
    first, again, other = (
        TASKS[task].datasets(Source(chunker, lengths=(2048,), seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_length_too_short_for_a_test_is_refused(chunker):
    with pytest.raises(ValueError, match="64 tokens are too few"):
        TASKS["ruler"].datasets(Source(chunker, lengths=(64,)))


# Scores


def test_the_accepted_answer_scores_one_and_a_shuffled_summary_less():
    summary = "The crew sailed north in spring and came home with the autumn storms."
    shuffled = summary.split()
    random.Random(0).shuffle(shuffled)
    assert rouge_l(summary, ["Something else.", summary]) == 1.0
    assert rouge_l(" ".join(shuffled), [summary]) < 0.7
    assert rouge_l("", [summary]) == 0.0


def test_recall_is_the_share_of_answers_in_the_prediction():
    assert recall("It is DELTA, and then 4711.", ["delta", "4711", "echo", "fox"]) == 0.5


# Runs


@pytest.mark.parametrize("name", ["needle", "ruler", "summarize"])
def test_each_task_runs_and_resumes(name, tiny_engine, tmp_path):
    engine = tiny_engine()
    engine.runtime.model.config.max_position_embeddings = 2048
    data = written(tmp_path, longbench(input="", context=TEXT[:400]))
    source = Source(Chunker.of(engine, 128), data=(data,), lengths=LENGTHS[name])
    examples = TASKS[name].datasets(source)[0][:1]
    methods = [make_method("full_reuse"), make_method("full_prefill")]
    record = tmp_path / "rows.jsonl"
    rows = evaluate(engine, name, examples, methods, record, progress=False)
    figures = {"needle": {"recall", "gold_nll"}, "ruler": {"recall"}, "summarize": {"rouge_l"}}
    assert set(rows[0]) >= figures[name] | {"ttft_s", "answer"} | set(examples[0].labels)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text(lines[0] + lines[1][:40])
    again = evaluate(engine, name, examples, methods, record, progress=False)
    assert again[0] == rows[0]
    assert evaluate(engine, name, examples, methods, record, progress=False) == again
    assert len(record.read_text().splitlines()) == 3  # the cut line, and no row twice


def test_the_same_id_with_another_text_is_another_row(tiny_engine, tmp_path):
    engine, record, rows = tiny_engine(), tmp_path / "rows.jsonl", []
    for text in ("Ada keeps the lamp.", "Ada keeps the key."):
        data = written(tmp_path, longbench(context=text))
        rows += evaluate(engine, "fidelity", read_examples(data), METHODS, record, progress=False)
    assert rows[0]["kl_answer"] != rows[1]["kl_answer"]
