"""The evaluation: figures that mean what they say, runs that resume, a command that reports."""

from __future__ import annotations

import json

import pytest

from a3_engine.cli import main
from a3_engine.evaluation.datasets import Example, Passage, read_examples, sample_examples
from a3_engine.evaluation.fidelity import fidelity, full_prefill
from a3_engine.evaluation.metrics import bootstrap, exact_match, f1
from a3_engine.evaluation.run import evaluate
from a3_engine.evaluation.summary import summarize
from a3_engine.method import make_method
from tests.tiny import tiny_model, tiny_tokenizer

EXAMPLES = [
    Example(
        id=str(number),
        dataset="tiny",
        question=f"Who keeps lamp {number}?",
        answers=("the keeper",),
        passages=(
            Passage("Lamp", f"The lamp of lighthouse {number} burns at night.", gold=True),
            Passage("", "The northern shore is steep, and few boats land there."),
        ),
    )
    for number in range(3)
]
METHODS = [make_method("full_reuse"), make_method("mend", 0.3)]


# Of some, the layers see less than the prompt; of others, they fold it into a state.
@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "gemma2", "gemma3", "qwen2-sliding", "lfm2"]
)
def test_at_ratio_one_nothing_differs(tiny_engine, architecture):
    engine = tiny_engine(architecture)
    result = fidelity(engine, full_prefill(engine, EXAMPLES[0]), make_method("mend", 1.0))
    assert result.kl_first < 1e-6
    assert result.kl_answer < 1e-6
    assert abs(result.nll_change) < 1e-4
    assert result.agreement == 1.0


def test_full_reuse_differs(tiny_engine):
    engine = tiny_engine()
    result = fidelity(engine, full_prefill(engine, EXAMPLES[0]), make_method("full_reuse"))
    assert result.kl_answer > 1e-4


def test_a_run_resumes_where_it_was_killed(tiny_engine, tmp_path):
    """Rows on record are taken over, a line cut short is run again, and nothing runs twice."""
    engine, record = tiny_engine(), tmp_path / "rows.jsonl"
    rows = evaluate(engine, "fidelity", EXAMPLES, METHODS, record, progress=False)
    assert len(rows) == len(EXAMPLES) * len(METHODS)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:3]) + lines[3][:20])
    again = evaluate(engine, "fidelity", EXAMPLES, METHODS, record, progress=False)
    keys = [(row["id"], row["method"]) for row in rows]
    assert sorted((row["id"], row["method"]) for row in again) == sorted(keys)
    kept = {json.dumps(row) for row in again}
    assert {line.strip() for line in lines[:3]} <= kept


def test_summaries_are_means_with_intervals_around_them(tiny_engine):
    rows = evaluate(tiny_engine(), "qa", EXAMPLES, [make_method("full_prefill"), *METHODS])
    for summary in summarize(rows):
        members = [row["f1"] for row in rows if row["method"] == summary["method"]]
        assert summary["n"] == 3
        assert summary["f1"] == pytest.approx(sum(members) / 3, abs=1e-5)
        low, high = summary["ci95"]["f1"]
        assert low <= summary["f1"] <= high
        assert ("paired" in summary) == (summary["method"] != "full_prefill")


def test_scores_follow_longbench():
    assert exact_match("The Keeper!", ["keeper"]) == 1.0
    assert f1("the old keeper of lamps", ["keeper of the lamp"]) == pytest.approx(4 / 7)
    assert f1("nothing", ["keeper"]) == 0.0
    assert f1("", ["keeper"]) == 0.0


def test_the_bootstrap_narrows_with_more_examples():
    few, many = bootstrap([0.0, 1.0] * 5), bootstrap([0.0, 1.0] * 500)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "q", "answers": ["a"], "ctxs": []}\n{"question": "q"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_examples(path)


def test_the_sample_has_its_answers_in_its_gold_passages():
    examples = sample_examples()
    assert len(examples) == 48
    for example in examples:
        gold = " ".join(passage.text for passage in example.passages if passage.gold)
        assert any(answer in gold for answer in example.answers)


def test_the_command_prints_one_line_a_method(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    row = {"question": "Who?", "answers": ["Ada"], "ctxs": [{"title": "", "text": "Ada keeps it."}]}
    data.write_text(json.dumps(row) + "\n")
    command = ["eval", "--data", str(data), "--model", str(tmp_path / "model"), "--json"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--dtype", "float32"]
    assert main([*command, "--methods", "full_reuse,default", "--ratios", "0.5,0.2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["ratio"]) for line in lines] == [
        ("full_reuse", 0.0),
        ("mend", 0.5),
        ("mend", 0.2),
    ]
    assert set(lines[0]) >= {"dataset", "n", "kl_first", "kl_answer", "agreement", "nll_change"}
    assert main(["eval", "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_a_record_of_another_engine_is_not_taken_over(tiny_engine, tmp_path):
    """Nor are examples without ids mistaken for one another."""
    record, data = tmp_path / "rows.jsonl", tmp_path / "data.jsonl"
    row = {"question": "Who?", "answers": ["Ada"], "ctxs": [{"text": "Ada keeps the lamp."}]}
    data.write_text("".join(json.dumps(row | {"question": q}) + "\n" for q in ("Who?", "Where?")))
    examples = read_examples(data)
    ours, theirs = (
        evaluate(tiny_engine(name), "fidelity", examples, METHODS[:1], record, progress=False)
        for name in ("llama", "qwen2")
    )
    assert len({row["kl_answer"] for row in ours + theirs}) == 4
