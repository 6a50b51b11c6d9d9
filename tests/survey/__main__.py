"""Prints, by family, which architectures are fused and exact, which are refused and why.

    python -m tests.survey [--dtype bfloat16] [PART_OF_A_FAMILY'S_NAME ...]

*exact*: at ratio 1.0 the logits are those of an untouched copy's ordinary forward, at 0.0 those of
an independent computation of full reuse, and the greedy answer is transformers' own. *refused*: the
gate says why, and the answer is transformers' own. *let through*: in another dtype than fp32, where
that is all that is asked. Anything else is *wrong*, and the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings

import torch
import transformers

from tests.survey.configurations import CONFIGURATIONS
from tests.survey.looking import look


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="parts of families' names; all where none")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    counts: dict[str, int] = {}
    for family, names in CONFIGURATIONS.items():
        if options.families and not any(part in family for part in options.families):
            continue
        print(f"\n| {family} | | | s |\n|---|---|---|---|", flush=True)
        for name in names:
            began = time.process_time()
            state, more = look(name, getattr(torch, options.dtype))
            counts[state] = counts.get(state, 0) + 1
            took = time.process_time() - began
            print(f"| {name} | {state} | {more} | {took:.1f} |", flush=True)
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    print(f"\n{sum(counts.values())} configurations: {total}.")
    return 1 if "wrong" in counts else 0


if __name__ == "__main__":
    sys.exit(main())
