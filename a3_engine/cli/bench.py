"""`a3 bench`: where the time to the first token goes, and how near it is to what is possible."""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from a3_engine.benchmark import simulate
from a3_engine.benchmark.plots import stacked_parts
from a3_engine.benchmark.run import run
from a3_engine.benchmark.table import tables
from a3_engine.chunks.codecs import CODEC_NAMES
from a3_engine.chunks.stand_in import AUTO
from a3_engine.cli.options import STAND_IN_HELP, stand_in
from a3_engine.cli.plot import check_suffix, save
from a3_engine.engine import A3Engine
from a3_engine.fusion.selectors import DEFAULT
from a3_engine.method import make_methods
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.model.loading import default_cache_dir, load_model


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    run = commands.add_parser(
        "bench",
        help="measure speed and memory, beside the machine's limit",
        description="Time to first token by parts, decoding, ingestion and memory, on prompts of "
        "the shipped sample's text, with the chunks on a warm disk. Methods take turns.",
    )
    run.add_argument(
        "--contexts",
        type=_numbers,
        default="1024,2048,4096,8192",
        help="tokens of retrieved text; cut to what the window holds (default: %(default)s)",
    )
    run.add_argument(
        "--methods",
        default="full_prefill,full_reuse,default",
        help=f"names; default is {DEFAULT} (default: %(default)s)",
    )
    run.add_argument("--ratios", default="0.15,0.05", help="0 to 1 (default: %(default)s)")
    run.add_argument(
        "--chunk-tokens", type=_numbers, default="512", help="chunk sizes (default: %(default)s)"
    )
    run.add_argument("--repeats", type=_count, default=5, help="rounds (default: %(default)s)")
    run.add_argument(
        "--answer-tokens", type=_count, default=33, help="of every answer (default: %(default)s)"
    )
    run.add_argument(
        "--at-once",
        type=_count,
        default=0,
        help="also decode so many requests at once, beside one and transformers' generate",
    )
    run.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    run.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    run.add_argument("--stand-in", type=stand_in, default=AUTO, help=STAND_IN_HELP)
    run.add_argument("--codec", default="raw", choices=CODEC_NAMES, help="how chunks are stored")
    run.add_argument(
        "--simulate",
        action="store_true",
        help="measure nothing; print what other models and machines would take, by their data "
        "sheets, for --contexts and the first of --ratios",
    )
    run.add_argument("--json", action="store_true", help="print one JSON object")
    run.add_argument("--plot", type=Path, help="draw the parts into a .png, .svg or .pdf file")
    run.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    if options.plot:
        check_suffix(options.plot)
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    if options.simulate:
        print(simulate.tables(options.contexts, ratios[0]))
        return
    methods = make_methods(options.methods.split(","), ratios)
    load = partial(load_model, options.model, cache_dir=default_cache_dir(), dtype=options.dtype)
    with tempfile.TemporaryDirectory(prefix="a3-bench-") as store:
        engine = A3Engine(
            load,
            name=options.model,
            cache_dir=store,
            codec=options.codec,
            stand_in=options.stand_in,
        )
        model = engine.runtime.model
        # No such token: all answers have the same length.
        model.generation_config.eos_token_id = model.config.get_text_config().vocab_size
        found = run(
            engine,
            options.contexts,
            methods,
            chunk_sizes=options.chunk_tokens,
            repeats=options.repeats,
            answer_tokens=options.answer_tokens,
            at_once=options.at_once,
        )
        engine.close()
    print(json.dumps(found) if options.json else tables(found))
    if options.plot:
        save(stacked_parts(found), options.plot)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _numbers(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]
