"""`a3 plot`: pictures of what `a3 eval --output` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from a3_engine.evaluation.plots import PLOTS
from a3_engine.evaluation.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    run = commands.add_parser("plot", help="draw what eval --output wrote")
    run.add_argument(
        "kind",
        choices=tuple(PLOTS),
        help="needle: heat map, a panel a method; pareto: fidelity against time to first token; "
        "ratio: fidelity against recompute ratio",
    )
    run.add_argument("rows", type=Path, nargs="+", help="files of rows (JSON lines)")
    run.add_argument("--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    run.add_argument(
        "--value",
        help="recall or gold_nll for needle (default: recall); kl_answer, kl_first, agreement or "
        "nll_change otherwise (default: kl_answer)",
    )
    run.set_defaults(run=run_plot)


def run_plot(options: argparse.Namespace) -> None:
    """Draw one picture into the output file."""
    check_suffix(options.output)
    rows = [row for path in options.rows for row in read_rows(path)]
    value = {"value": options.value} if options.value else {}
    save(PLOTS[options.kind](rows, **value), options.output)


def check_suffix(path: Path) -> None:
    """Raise `ValueError` for a file that cannot hold a picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, with the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
