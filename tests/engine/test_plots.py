"""Pictures show what the rows say, for every method and dataset in them."""

from __future__ import annotations

import json

import pytest

from a3_engine.cli import main
from a3_engine.evaluation.plots import PLOTS, by_ratio, needle_map, pareto


def fidelity_row(dataset, method, ratio, number, **fields):
    row = {"engine": "e", "task": "fidelity", "dataset": dataset, "id": str(number)}
    row |= {"method": method, "ratio": ratio, "kl_answer": 0.2 + number / 10 - ratio / 5}
    return row | {"ttft_s": 1.0, "full_prefill_ttft_s": 4.0} | fields


FIDELITY = [
    fidelity_row(dataset, method, ratio, number)
    for dataset in ("nq", "squad")
    for method, ratio in (("full_reuse", 0.0), ("a3", 0.15), ("a3", 0.3), ("full_prefill", 1.0))
    for number in range(3)
]
NEEDLE = [
    {"engine": "e", "task": "needle", "dataset": f"needle_{length}", "id": "0", "method": method,
     "ratio": 0.15, "length": length, "depth": depth, "recall": depth / 100, "gold_nll": 1.0}
    for method in ("a3", "mend") for length in (512, 1024) for depth in (0, 50, 100)
]  # fmt: skip


def test_the_needle_map_has_a_panel_a_method_with_the_means_in_its_cells():
    twice = [{**row, "recall": 0.0, "id": "1"} for row in NEEDLE if row["depth"] == 100]
    panels = [axes for axes in needle_map([*NEEDLE, *twice]).axes if axes.get_title()]
    assert [panel.get_title() for panel in panels] == ["a3 @ 0.15", "mend @ 0.15"]
    for panel in panels:
        grid = panel.get_images()[0].get_array().tolist()
        assert grid == [[0.0, 0.0], [0.5, 0.5], [0.5, 0.5]]
        assert [text.get_text() for text in panel.texts] == ["0.00"] * 2 + ["0.50"] * 4


@pytest.mark.parametrize(
    ("draw", "places"), [(pareto, [[0.25], [0.25, 0.25]]), (by_ratio, [[0.0], [0.15, 0.3]])]
)
def test_curves_stand_where_the_rows_say(draw, places):
    figure = draw(FIDELITY)
    assert [axes.get_title() for axes in figure.axes] == ["nq, n = 3", "squad, n = 3"]
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert [pytest.approx(line.get_xdata()) for line in lines] == places
        assert lines[1].get_ydata() == pytest.approx([0.27, 0.24])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["full_reuse", "a3"]  # full prefill is what they are compared with


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command_draws_into_a_file(kind, suffix, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in FIDELITY + NEEDLE) + '{"cut')
    picture = tmp_path / "out" / f"picture.{suffix}"
    assert main(["plot", kind, str(rows), "--output", str(picture)]) == 0
    head = picture.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in head


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match="no rows of `a3 eval needle`"):
        needle_map(FIDELITY)
    with pytest.raises(ValueError, match="no 'recall' to draw; there is kl_answer"):
        pareto(FIDELITY, "recall")
    with pytest.raises(ValueError, match="several models"):
        by_ratio([*FIDELITY, fidelity_row("nq", "a3", 0.15, 9, engine="other")])
