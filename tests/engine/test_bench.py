"""A benchmark's prompts have the size that they say, and its parts are all of the time."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from a3_engine.benchmark.conversation import SYSTEM, conversations, converse, summary, table
from a3_engine.benchmark.memory import peak_growth
from a3_engine.benchmark.plots import computed_by_turn, stacked_parts
from a3_engine.benchmark.prompts import QUESTION, build_prompt, chunk_texts, fitting
from a3_engine.benchmark.requests import PARTS
from a3_engine.benchmark.run import run
from a3_engine.benchmark.table import tables
from a3_engine.cli import main
from a3_engine.evaluation.datasets import Example, Passage, articles, sample_examples
from a3_engine.method import make_method, make_methods
from tests.tiny import LONG, STAND_IN, tiny_model, tiny_tokenizer

METHODS = ["full_prefill", "full_reuse", "default", "a3", "samkv"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One round of every kind of method on a tiny model."""
    from a3_engine import A3Engine

    engine = A3Engine.from_pretrained(
        tiny_model(LONG),
        tiny_tokenizer(),
        cache_dir=tmp_path_factory.mktemp("bench"),
        stand_in=STAND_IN,
    )
    engine.runtime.model.generation_config.eos_token_id = 10_000  # no such token
    methods = make_methods(METHODS, [0.0, 0.25])
    yield run(engine, [160, 96], methods, chunk_sizes=[48], repeats=1, answer_tokens=3, at_once=2)
    engine.close()


@pytest.mark.parametrize(("context", "size"), [(96, 32), (100, 64), (40, 64), (1000, 250)])
def test_chunks_are_text_of_exactly_so_many_tokens(context, size, tiny_engine):
    planner = tiny_engine(LONG).runtime.planner
    texts = chunk_texts(planner, context, size)
    whole, rest = divmod(context, size)
    assert [len(planner.chunk_ids(text)) for text in texts] == [size] * whole + [rest] * (rest > 0)
    sample = "\n\n".join(p for _, paragraphs in articles(sample_examples()) for p in paragraphs)
    places = [sample.index(text) for text in texts]
    ends = [place + len(text) for place, text in zip(places, texts, strict=True)]
    gaps = [start - end for end, start in zip([0, *ends], places, strict=False)]
    assert all(0 <= gap < 16 for gap in gaps)


@pytest.mark.real_model
def test_where_the_sample_ends_it_begins_again_in_other_chunks(demo_engine):
    planner = demo_engine.runtime.planner
    texts = chunk_texts(planner, 16_384, 1024)
    assert [len(planner.chunk_ids(text)) for text in texts] == [1024] * 16
    assert len(set(texts)) == 16
    start = texts[0][:200]
    assert any(start in text for text in texts[1:])


def test_the_prompt_is_the_question_behind_the_chunks(tiny_engine):
    engine = tiny_engine(LONG)
    prompt = build_prompt(engine, 96, 32)
    kinds = [segment.kind for segment in prompt.segments if segment.kind == "chunk"]
    assert len(kinds) == 3
    assert prompt.segments[-1].ids[-1:] == engine.plan(QUESTION).segments[-1].ids[-1:]


def test_what_does_not_fit_into_the_window_is_cut_or_refused(tiny_engine):
    engine = tiny_engine(LONG)
    assert fitting(engine, 4096, 512, 8) == 4096
    cut = fitting(engine, engine.context_window, 512, 8)
    assert cut % 256 == 0
    assert build_prompt(engine, cut, 16_384).n_tokens + 8 <= engine.context_window
    with pytest.raises(ValueError, match="has no room for a context"):
        fitting(tiny_engine("llama"), 1024, 512, 500)


def test_the_parts_are_all_of_the_time_to_the_first_token(found):
    for row in found["results"]:
        assert sum(row["parts_s"].values()) == pytest.approx(row["ttft_s"]["median"], abs=2e-4)
        assert min(row["parts_s"].values()) >= 0
        assert set(row["parts_s"]) == set(PARTS)
        assert row["decode_per_s"]["median"] > 0
        assert row["recomputed_tokens"] + row["fresh_tokens"] <= row["prompt_tokens"]


def test_there_is_a_row_for_every_context_method_and_ratio(found):
    rows = [(row["context_tokens"], row["method"], row["ratio"]) for row in found["results"]]
    each = [("full_prefill", 1.0), ("full_reuse", 0.0)]
    each += [(name, ratio) for name in ("mend", "a3", "samkv") for ratio in (0.0, 0.25)]
    assert rows == [(context, *pair) for context in (160, 96) for pair in each]
    read = {row["method"]: row["bytes_read"] for row in found["results"]}
    assert read["full_prefill"] == 0
    assert read["mend"] == read["full_reuse"] > 0
    assert json.loads(json.dumps(found)) == found


def test_fewer_rows_need_less(found):
    by = {
        (row["context_tokens"], row["method"], row["ratio"]): row["roofline"]
        for row in found["results"]
    }
    assert by[160, "samkv", 0.25] is None
    for context in (160, 96):
        full, reuse, some = (
            by[context, *key]
            for key in (("full_prefill", 1.0), ("full_reuse", 0.0), ("mend", 0.25))
        )
        assert reuse["rows"] < some["rows"] < full["rows"]
        assert reuse["flops"] < some["flops"] < full["flops"]
        assert reuse["limit_s"] <= some["limit_s"] < full["limit_s"]
        assert full["pass_to_limit"] > 1  # nothing is faster than its limit


def test_ingestion_is_measured_on_the_chunks_of_one_length(found):
    assert [each["chunks"] for each in found["ingestion"]] == [3, 2]
    for each in found["ingestion"]:
        assert each["chunk_tokens"] == 48
        assert each["ingest_per_s"]["median"] > 0 < each["forward_per_s"]["median"]


def test_the_table_has_a_line_a_row(found):
    lines = tables(found).splitlines()
    for name in ("full_prefill", "full_reuse", "mend", "a3", "samkv"):
        count = sum(row["method"] == name for row in found["results"])
        assert sum(f" {name} " in line for line in lines) == count


def test_the_picture_stacks_the_parts(found):
    figure = stacked_parts(found)
    assert [axes.get_title() for axes in figure.axes] == [
        "160 tokens in chunks of 48",
        "96 tokens in chunks of 48",
    ]
    rows = [row for row in found["results"] if row["context_tokens"] == 160]
    bars = figure.axes[0].containers
    assert len(bars) == len(PARTS)
    for part, drawn in zip(PARTS, bars, strict=True):
        heights = [row["parts_s"][part] for row in rows]
        assert [bar.get_height() for bar in drawn] == pytest.approx(heights)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_memory_that_is_freed_again_counts():
    def call() -> None:
        torch.ones(2**26, dtype=torch.uint8)

    for _ in range(2):  # what the first call freed does not hide the second's
        # The system counts resident pages in batches.
        assert peak_growth(call, torch.device("cpu")) == pytest.approx(2**26, rel=0.05)


def test_the_command_prints_json_and_draws(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model(LONG).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    picture = tmp_path / "out" / "bench.png"
    arguments = ["bench", "--model", str(folder), "--contexts", "64", "--chunk-tokens", "32"]
    arguments += ["--methods", "full_prefill,default", "--ratios", "0.5", "--repeats", "1"]
    arguments += ["--answer-tokens", "2", "--json", "--plot", str(picture)]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in printed["results"]] == ["full_prefill", "mend"]
    assert {"median", "min", "max"} == set(printed["results"][0]["ttft_s"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-1], str(tmp_path / "bench.txt")]) == 1
    assert "must end in one of" in capsys.readouterr().err


def test_decoding_is_measured_alone_and_at_once(found):
    for row in found["decoding"]:
        assert row["requests"] == 2
        for name in ("one", "generate", "request", "at_once", "step", "steps"):
            assert row[f"{name}_per_s"]["min"] > 0
    assert len(found["decoding"]) == 2
    assert "2 at once" in tables(found)


def test_a_conversations_turns_are_counted(tiny_engine):
    """What is read of its history grows, and a prefix cache has no more than the first words."""
    engine = tiny_engine(LONG)
    examples = [
        Example(
            str(n),
            "lamps",
            f"Who lit the lamp of the lighthouse in the year {n}?",
            ("the keeper",),
            (Passage("", f"In the year {n} the keeper of the harbour lit the lamp himself."),),
        )
        for n in range(4)
    ]
    (group,) = conversations(examples, 1, 4)
    turns = list(converse(engine, group, make_method("default"), 6, compared=(2, 4)))
    assert [turn.number for turn in turns] == [1, 2, 3, 4]
    read = [turn.history_tokens for turn in turns]
    assert read[:2] == [0, 0]
    assert 0 < read[2] < read[3]
    start = len(engine.runtime.planner.tokenize_text(SYSTEM))
    for turn in turns[1:]:
        assert start < turn.prompt_tokens - turn.behind_prefix < start + 40
        assert turn.prompt_tokens <= turn.cached_tokens + turn.computed
        assert (turn.kl is None) == (turn.number == 3)
    rows = summary(turns)
    assert [row["kl"] is None for row in rows] == [True, False, True, False]
    assert len(table(rows).splitlines()) == 2 + len(rows)
    pytest.importorskip("matplotlib")
    assert len(computed_by_turn(rows).axes[0].lines) == 3
    with pytest.raises(ValueError, match="need 8 questions"):
        conversations(examples, 2, 4)
