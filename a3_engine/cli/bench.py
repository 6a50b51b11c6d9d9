"""`a3 bench`: where the time to the first token goes, and how near it is to what is possible."""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from a3_engine.benchmark.conversation import (
    TURNS,
    conversations,
    measure_conversations,
    summary,
    table,
)
from a3_engine.benchmark.plots import computed_by_turn, stacked_parts
from a3_engine.benchmark.run import run
from a3_engine.benchmark.table import tables
from a3_engine.chunks.codecs import CODEC_NAMES
from a3_engine.chunks.stand_in import AUTO
from a3_engine.cli.options import STAND_IN_HELP, stand_in
from a3_engine.cli.plot import check_suffix, save
from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import read_examples, sample_examples
from a3_engine.fusion.selectors import DEFAULT
from a3_engine.method import make_method, make_methods
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
        help="also decode N requests at once, beside one and transformers' generate",
    )
    run.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    run.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    run.add_argument("--stand-in", type=stand_in, default=AUTO, help=STAND_IN_HELP)
    run.add_argument("--codec", default="raw", choices=CODEC_NAMES, help="how chunks are stored")
    run.add_argument(
        "--conversations",
        type=_count,
        help=f"measure N conversations of {TURNS} turns instead, whose documents change at "
        "each turn, by the first of --methods but full prefill: what is computed a turn, beside a "
        "prefix cache, and how far answers are from a full prefill's",
    )
    run.add_argument(
        "--data",
        type=Path,
        help="of conversations: JSON lines as for a3 eval; the shipped sample if absent",
    )
    run.add_argument("--json", action="store_true", help="print one JSON object")
    run.add_argument("--plot", type=Path, help="draw the parts into a .png, .svg or .pdf file")
    run.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    if options.plot:
        check_suffix(options.plot)
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    methods = make_methods(options.methods.split(","), ratios)
    if options.conversations:
        examples = read_examples(options.data) if options.data else sample_examples()
        groups = conversations(examples, options.conversations, TURNS)
        method = next((each for each in methods if each.selector.uses_chunks), make_method(DEFAULT))
    load = partial(load_model, options.model, cache_dir=default_cache_dir(), dtype=options.dtype)
    with tempfile.TemporaryDirectory(prefix="a3-bench-") as store:
        engine = A3Engine(
            load,
            name=options.model,
            cache_dir=store,
            codec=options.codec,
            stand_in=options.stand_in,
        )
        if options.conversations:
            rows = summary(
                list(measure_conversations(engine, groups, method, options.answer_tokens))
            )
            print(json.dumps(rows) if options.json else table(rows))
            if options.plot:
                save(computed_by_turn(rows), options.plot)
            engine.close()
            return
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
