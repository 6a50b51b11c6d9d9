"""`a3 tune`: settings found by measurement, saved, and used by every engine of the model."""

from __future__ import annotations

import json
import math
import os

import pytest
from transformers import LlamaConfig

from a3_engine import A3Engine
from a3_engine.chunks import stand_in
from a3_engine.chunks.fingerprint import model_fingerprint, tokenizer_fingerprint
from a3_engine.cli import main
from a3_engine.evaluation import tuning
from a3_engine.evaluation.tuning import Tuner, make_examples
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.profile import Profile, profile_path, read_profile, write_profile
from tests.texts import LAMP
from tests.tiny import SHAPE, STAND_IN, tiny_model, tiny_tokenizer

OWN = Profile(("Harbour\nTwo boats lie there.",), 0.4, 0.5)
LONG = LlamaConfig(**{**SHAPE, "max_position_embeddings": 4096})


def saved(folder, profile, name="llama"):
    """Save a profile of a tiny model; returns where."""
    path = profile_path(
        folder,
        model_fingerprint(tiny_model(name)),
        tokenizer_fingerprint(tiny_tokenizer()),
        "template",
    )
    write_profile(path, profile, {})
    return path


def test_a_saved_profile_is_what_an_engine_does(tiny_engine, tmp_path):
    path = saved(tmp_path / "cache", OWN)
    assert path.stat().st_mode & 0o077 == 0
    tuned, by_hand = tiny_engine(), tiny_engine(stand_in=OWN.stand_in, selector=OWN.selector)
    answers = [
        engine.generate("Who sleeps?", chunks=[LAMP, LAMP[4:]], max_new_tokens=4)
        for engine in (tuned, by_hand)
    ]
    assert answers[0].text == answers[1].text
    assert [answer.report.ratio for answer in answers] == [0.4, 0.4]
    assert answers[0].report.stand_in == answers[1].report.stand_in != ""
    assert answers[1].report.hits == 2
    assert tuned.fingerprint == by_hand.fingerprint


def test_what_is_asked_for_goes_before_the_profile(tiny_engine, tmp_path):
    saved(tmp_path / "cache", OWN)

    def ratio(engine: A3Engine, **how: object) -> float:
        return engine.generate("Who?", chunks=[LAMP], max_new_tokens=1, **how).report.ratio

    engine = tiny_engine()
    assert ratio(engine) == ratio(engine, quality="balanced") == 0.4
    assert ratio(engine, ratio=0.2) == 0.2
    assert ratio(engine, quality="fast") == 0.0
    assert ratio(engine, selector="a3") != 0.4
    assert ratio(tiny_engine(quality="balanced")) == 0.4
    for settings in ({"selector": "mend"}, {"stand_in": "shipped"}, {"encode_prefix": "bos"}):
        assert ratio(tiny_engine(**settings)) == Mend().ratio
    assert ratio(tiny_engine("qwen2")) == Mend().ratio  # its weights are others


def test_what_others_can_write_and_what_is_damaged_is_not_believed(tiny_engine, tmp_path, caplog):
    path = saved(tmp_path / "cache", OWN)
    good = path.read_text()
    for bad in (
        "",
        "[]",
        "{",
        json.dumps({**json.loads(good), "ratio": 2}),
        json.dumps({**json.loads(good), "ratio": "0.1"}),
        json.dumps({**json.loads(good), "stand_in": 3}),
        json.dumps({**json.loads(good), "stand_in": ["x", 3]}),
        json.dumps({**json.loads(good), "strength": float("nan")}),
    ):
        path.write_text(bad)
        caplog.clear()
        assert read_profile(path) is None
        assert "a3 tune" in caplog.text
    path.write_text(good)
    assert read_profile(path) == OWN
    path.chmod(0o666)
    assert read_profile(path) is None
    path.chmod(0o600)
    moved = path.rename(path.with_suffix(".elsewhere"))
    os.symlink(moved, path)
    assert read_profile(path) is None
    answer = tiny_engine().generate("Who?", chunks=[LAMP], max_new_tokens=1)
    assert answer.report.ratio == Mend().ratio


@pytest.fixture
def documents(monkeypatch):
    monkeypatch.setattr(tuning, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(stand_in, "PASSAGES", tuple(STAND_IN))  # 2,108 tokens to a tiny tokenizer
    return [
        f"Number {n} of the lighthouse keepers was called {name} and slept by day for {n} years."
        for n, name in enumerate(("Ada", "Bea", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal") * 3)
    ]


def test_it_measures_once_and_chooses_what_was_nearest(documents, tmp_path):
    record = tmp_path / "rows.jsonl"

    def tune():
        tuner = Tuner(tiny_model(LONG), tiny_tokenizer(), documents, prompts=2, record=record)
        tuner.progress = False
        return tuner.run()

    tuned = tune()
    measured = record.read_text()
    assert {figure.stand_in for figure in tuned.figures} == {
        "shipped",
        "none",
        "documents 1",
        "documents 2",
    }
    assert all(math.isfinite(figure.chosen_on) for figure in tuned.figures)
    assert len({(f.stand_in, f.selector) for f in tuned.figures}) == len(tuned.figures)
    compared = [f for f in tuned.figures if f.selector.ratio == Mend.ratio]
    nearest = min(compared, key=lambda figure: figure.chosen_on)
    of_ratios = [
        f
        for f in tuned.figures
        if f.stand_in == nearest.stand_in
        and (f.selector.ratio == 0 or f.selector.correction == nearest.selector.correction)
    ]
    assert sorted(f.selector.ratio for f in of_ratios) == [0, Mend.ratio, 0.15, 0.25]
    least = min(figure.chosen_on for figure in of_ratios)
    assert tuned.best.chosen_on <= tuning.ENOUGH * least
    cheaper = [f for f in of_ratios if f.selector.ratio < tuned.best.selector.ratio]
    assert all(figure.chosen_on > tuning.ENOUGH * least for figure in cheaper)
    assert tuned.profile.selector == tuned.best.selector
    assert tuned.better == (tuned.best.reported_on < tuned.default.reported_on)

    record.write_text(measured[: len(measured) // 2])  # a kill in the middle of a line
    assert tune() == tuned
    assert {*measured.splitlines()} <= {*record.read_text().splitlines()}
    n_lines = len(record.read_text().splitlines())
    assert tune() == tuned
    assert len(record.read_text().splitlines()) == n_lines


def test_the_command_saves_what_engines_then_use(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning.Tuned, "better", True)
    model, folder = tmp_path / "model", tmp_path / "docs"
    tiny_model(LONG).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    folder.mkdir()
    for number, text in enumerate(documents):
        (folder / f"{number}.txt").write_text(text)
    command = ["tune", "--documents", str(folder), "--model", str(model), "--dtype", "float32"]
    assert main([*command, "--prompts", "2", "--cache-dir", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "cache" / "profiles").glob("*.json")
    assert str(path) in printed
    profile = read_profile(path)
    engine = A3Engine.from_pretrained(model, cache_dir=tmp_path / "cache", dtype="float32")
    assert engine.runtime.profile == profile
    report = engine.generate("Who?", chunks=[LAMP, documents[0]], max_new_tokens=1).report
    assert report.ratio == profile.ratio
    engine.close()


def test_too_few_documents_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="more documents"):
        make_examples(["one", "two"], 2, 0)
    with pytest.raises(ValueError, match="sentence"):
        make_examples(["a b c", "d", "e", "f", "g"], 2, 0)
    with pytest.raises(ValueError, match="One prompt"):
        Tuner(tiny_model("llama"), tiny_tokenizer(), [LAMP], prompts=1)
    assert main(["tune", "--documents", str(tmp_path / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_prompts_ask_about_what_they_hold(documents):
    examples = make_examples(documents, 6, seed=3)
    assert examples == make_examples(documents, 6, seed=3) != make_examples(documents, 6, seed=4)
    for example in examples:
        texts = [passage.text for passage in example.passages]
        assert len(set(texts)) == tuning.PASSAGES
        assert any(example.answers[0] in text for text in texts)
