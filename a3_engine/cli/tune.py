"""`a3 tune`: the settings that suit one model and one corpus, found by measurement and saved."""

from __future__ import annotations

import argparse
from pathlib import Path

from a3_engine.chunks.fingerprint import model_fingerprint, tokenizer_fingerprint
from a3_engine.cli.reading import documents, folder
from a3_engine.evaluation.tuning import Figure, Tuner
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.model.loading import default_cache_dir, load_model
from a3_engine.profile import profile_path, write_profile


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    run = commands.add_parser(
        "tune",
        help="find the stand-in, correction and ratio that suit a model and your documents",
        description="Makes prompts of your documents, tries settings by their divergence from the "
        "model's own full prefill, and saves the best as the profile that every engine of this "
        "model in this folder uses from then on. Can be stopped, and goes on where it was.",
    )
    run.add_argument(
        "--documents",
        type=Path,
        required=True,
        metavar="FOLDER",
        help='.txt, .md and .rst files, and .jsonl files whose lines have a "text"',
    )
    run.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    run.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    run.add_argument("--encode-prefix", default="template", help="what chunks are computed after")
    run.add_argument("--cache-dir", type=folder, help="the folder whose engines use the profile")
    run.add_argument(
        "--prompts", type=int, default=12, help="made of the documents (default: %(default)s)"
    )
    run.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    run.set_defaults(run=run_tune)


def run_tune(options: argparse.Namespace) -> None:
    """Print what was tried, and save the best where it is better than the defaults."""
    texts = [text for text, _ in documents(options.documents)]
    cache_dir = options.cache_dir or default_cache_dir()
    model, tokenizer = load_model(options.model, dtype=options.dtype, cache_dir=cache_dir)
    path = profile_path(
        cache_dir,
        model_fingerprint(model),
        tokenizer_fingerprint(tokenizer),
        options.encode_prefix,
    )
    record = path.with_suffix(".rows.jsonl")
    tuned = Tuner(
        model, tokenizer, texts, options.encode_prefix, options.prompts, options.seed, record
    ).run()
    print(f"{'stand-in':14} {'ratio':>6} {'strength':>8} {'KL, chosen on':>14} {'reported on':>12}")
    for figure in sorted(tuned.figures, key=lambda figure: figure.chosen_on):
        print(_line(figure))
    print(f"the defaults:\n{_line(tuned.default)}\nthe best:\n{_line(tuned.best)}")
    if tuned.better:
        figures = {"kl": tuned.best.reported_on, "kl_of_defaults": tuned.default.reported_on}
        write_profile(path, tuned.profile, {**figures, "prompts": options.prompts})
        print(f"Saved as {path}; remove the file to go back to the defaults.")
    else:
        print("The defaults are as near on prompts that did not choose; nothing was saved.")


def _line(figure: Figure) -> str:
    strength = "" if figure.strength is None else f"{figure.strength:.2f}"
    reported = "" if figure.reported_on is None else f"{figure.reported_on:12.4f}"
    return (
        f"{figure.stand_in:14} {figure.selector.ratio:6.2f} {strength:>8} {figure.chosen_on:14.4f} "
        f"{reported}"
    ).rstrip()
