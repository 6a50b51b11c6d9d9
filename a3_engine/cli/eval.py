"""`a3 eval`: methods side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example, read_examples, sample_examples
from a3_engine.evaluation.run import Row, evaluate, summarize
from a3_engine.fusion.selectors import DEFAULT, make_selector
from a3_engine.fusion.selectors.base import Selector
from a3_engine.model.gguf import DEMO_MODEL

FIXED_RATIO = {"full_prefill", "full_reuse"}
QUICK_ROWS = 6


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    run = commands.add_parser("eval", help="compare methods on questions with passages")
    run.add_argument(
        "task",
        nargs="?",
        choices=("fidelity", "qa"),
        default="fidelity",
        help="fidelity: distance from a full prefill of the same ids; qa: exact match and F1",
    )
    run.add_argument(
        "--data",
        type=Path,
        action="append",
        help='JSON lines {"question", "answers", "ctxs": [{"title", "text"}]}; repeatable; '
        "the shipped sample if absent",
    )
    run.add_argument(
        "--methods",
        default=f"full_reuse,a3,{DEFAULT}",
        help="names, separated by commas (default: %(default)s)",
    )
    run.add_argument("--ratios", default="0.15", help="separated by commas (default: 0.15)")
    run.add_argument("--half", choices=("first", "second"), help="of each file: tune, then report")
    run.add_argument("--limit", type=int, help="at most so many rows of each file")
    run.add_argument(
        "--quick", action="store_true", help=f"only {QUICK_ROWS} rows of the shipped sample"
    )
    run.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    run.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    run.add_argument("--encode-prefix", default="template", help="what chunks are computed behind")
    run.add_argument("--codec", default="raw", help="how chunks are stored: raw, int8, fp8, int4")
    run.add_argument("--cache-dir", help="folder of the chunk store")
    run.add_argument("--output", type=Path, help="keep every row here, and resume from it")
    run.add_argument("--json", action="store_true", help="one JSON line a dataset and method")
    run.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> None:
    """Print one line for every dataset, method and ratio."""
    engine = A3Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        cache_dir=options.cache_dir,
        encode_prefix=options.encode_prefix,
        codec=options.codec,
    )
    selectors = _selectors(
        options.methods.split(","), [float(r) for r in options.ratios.split(",")]
    )
    rows: list[Row] = []
    for examples in _datasets(options):
        rows += evaluate(engine, options.task, examples, selectors, options.output)
    engine.close()
    summaries = summarize(rows)
    if options.json:
        for summary in summaries:
            print(json.dumps(summary))
    else:
        _show(summaries)


def _selectors(methods: Sequence[str], ratios: Sequence[float]) -> list[Selector]:
    selectors = []
    for method in methods:
        name = DEFAULT if method == "default" else method
        each = [None] if name in FIXED_RATIO else ratios
        selectors += [make_selector(name, ratio) for ratio in each]
    return selectors


def _datasets(options: argparse.Namespace) -> list[list[Example]]:
    if options.quick or not options.data:
        sets = [sample_examples()]
    else:
        sets = [read_examples(path) for path in options.data]
    if options.half:
        first = options.half == "first"
        sets = [s[: len(s) // 2] if first else s[len(s) // 2 :] for s in sets]
    limit = QUICK_ROWS if options.quick else options.limit
    return [examples[:limit] for examples in sets]


def _show(summaries: Sequence[Row]) -> None:
    for summary in summaries:
        intervals = summary["ci95"]
        figures = []
        for name, value in summary.items():
            if isinstance(value, float) and name != "ratio":
                bounds = intervals.get(name)
                spread = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
                figures.append(f"{name} {value:.3f}{spread}")
        head = f"{summary['dataset']}  {summary['method']} @ {summary['ratio']:g}  n={summary['n']}"
        print(head, *figures, sep="\n    ")
