"""`a3 eval`: methods side by side."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from a3_engine.chunks.codecs import CODEC_NAMES
from a3_engine.chunks.stand_in import AUTO
from a3_engine.cli.options import STAND_IN_HELP, stand_in
from a3_engine.engine import A3Engine
from a3_engine.evaluation.chunking import CHUNK_TOKENS, Chunker
from a3_engine.evaluation.datasets import FORMS
from a3_engine.evaluation.rows import Row
from a3_engine.evaluation.run import evaluate
from a3_engine.evaluation.summary import summarize
from a3_engine.evaluation.tasks import TASKS
from a3_engine.evaluation.tasks.base import Source
from a3_engine.fusion.selectors import DEFAULT
from a3_engine.method import make_methods
from a3_engine.model.gguf import DEMO_MODEL

QUICK_ROWS, QUICK_LENGTHS = 6, "1024"


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    run = commands.add_parser(
        "eval",
        help="compare methods side by side",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="tasks:\n"
        + "\n".join(f"  {t.name:<10} {t.about}" for t in TASKS.values())
        + "\n\ndata:\n"
        + textwrap.indent(FORMS, "  "),
    )
    run.add_argument("task", nargs="?", choices=tuple(TASKS), default="fidelity")
    run.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="JSON lines in one of the forms below; repeatable; the shipped sample if absent",
    )
    run.add_argument(
        "--methods",
        "--method",
        default=f"full_reuse,a3,{DEFAULT}",
        help="names, separated by commas; NAME+COMPRESSION compresses the cache for decoding "
        "(default: %(default)s)",
    )
    run.add_argument("--keep", type=float, help="share of the cache that a compression keeps")
    run.add_argument(
        "--ratios",
        default="0.15",
        help="separated by commas; own is each method's own (default: 0.15)",
    )
    run.add_argument("--half", choices=("first", "second"), help="of each set: tune, then report")
    run.add_argument("--limit", type=int, help="rows of each set at most")
    run.add_argument(
        "--quick",
        action="store_true",
        help=f"only {QUICK_ROWS} rows of a set, {QUICK_LENGTHS} tokens where they are generated",
    )
    run.add_argument(
        "--chunk-tokens",
        type=int,
        default=CHUNK_TOKENS,
        help="of chunks that long contexts are cut into (default: %(default)s)",
    )
    made = run.add_argument_group("needle and ruler")
    made.add_argument("--text", type=Path, help="what contexts are made of; the sample if absent")
    made.add_argument("--lengths", help="tokens of contexts, separated by commas")
    made.add_argument(
        "--samples", type=int, default=4, help="of each kind and length (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of the generators")
    how = run.add_argument_group("engine and output")
    how.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    how.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    how.add_argument("--encode-prefix", default="template", help="what chunks are computed after")
    how.add_argument("--stand-in", type=stand_in, default=AUTO, help=STAND_IN_HELP)
    how.add_argument("--codec", default="raw", choices=CODEC_NAMES, help="how chunks are stored")
    how.add_argument("--cache-dir", help="folder of the chunk store")
    how.add_argument("--output", type=Path, help="keep every row here, and resume from it")
    how.add_argument("--json", action="store_true", help="one JSON line a set, method and ratio")
    run.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> None:
    """Print one line for every dataset, method and ratio."""
    methods = make_methods(
        options.methods.split(","),
        [None if ratio == "own" else float(ratio) for ratio in options.ratios.split(",")],
        options.keep,
    )
    engine = A3Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        cache_dir=options.cache_dir,
        encode_prefix=options.encode_prefix,
        stand_in=options.stand_in,
        codec=options.codec,
    )
    lengths = options.lengths or (QUICK_LENGTHS if options.quick else "")
    source = Source(
        Chunker.of(engine, options.chunk_tokens),
        data=tuple(options.data),
        text=options.text,
        lengths=tuple(int(length) for length in lengths.split(",") if length),
        samples=1 if options.quick else options.samples,
        seed=options.seed,
    )
    limit = min(options.limit or QUICK_ROWS, QUICK_ROWS) if options.quick else options.limit
    rows: list[Row] = []
    for examples in TASKS[options.task].datasets(source):
        middle = len(examples) // 2
        half = {"first": examples[:middle], "second": examples[middle:]}.get(options.half, examples)
        rows += evaluate(engine, options.task, half[:limit], methods, options.output)
    engine.close()
    for summary in summarize(rows):
        print(json.dumps(summary) if options.json else _described(summary))


def _described(summary: Row) -> str:
    lines = [f"{summary['dataset']}  {summary['method']} @ {summary['ratio']:g}  n={summary['n']}"]
    paired = summary.get("paired", {})
    for name, value in summary.items():
        if isinstance(value, float) and name != "ratio":
            bounds = summary["ci95"].get(name)
            line = f"{name} {value:.3f}" + (
                f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            )
            if name in paired:
                mean, low, high = paired[name]
                line += f"; to {paired['method']} {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(line)
    return "\n    ".join(lines)
