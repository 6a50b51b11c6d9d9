"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from a3_engine.chunks.stand_in import AUTO, NONE, SHIPPED

STAND_IN_HELP = (
    "passages that chunks are computed after as well: shipped, none, or a text file of your own "
    "in which empty lines stand between them; auto is what a3 tune saved for the model, or else "
    "shipped (default: auto)"
)


def stand_in(given: str) -> str | list[str]:
    """The engine's setting that a command line means."""
    if given in (AUTO, SHIPPED, NONE):
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{given!r} is neither {AUTO}, {SHIPPED}, {NONE} nor a text file ({error})"
        ) from error
    return [passage for passage in re.split(r"\n\s*\n", text.strip()) if passage]
