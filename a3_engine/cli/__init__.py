"""The `a3` command; each subcommand is one file of this folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from a3_engine import A3Error, __version__
from a3_engine.cli import bench, cache, eval, plot, tune
from a3_engine.cli.reading import InputError

COMMANDS = (eval, plot, bench, tune, cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except InputError as error:
        print(f"a3: {error}", file=sys.stderr)
        return 2
    except (A3Error, ValueError, OSError, ImportError) as error:
        print(f"a3: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="a3", description="Cached KV for retrieved chunks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
