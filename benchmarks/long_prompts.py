"""What `mend` loses in long prompts by attending to less: docs/results.md says what it found.

`python benchmarks/long_prompts.py FILE --half second --limit 14` spreads each question's passages
among those of the questions after it, up to 7,600 tokens, and compares the answer's divergence
from a full prefill (`a3 eval fidelity`) with that of attending to everything, in pairs.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from a3_engine import A3Engine
from a3_engine.evaluation.datasets import Example, read_examples
from a3_engine.evaluation.fidelity import fidelity, full_prefill
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.method import Method

MOST_TOKENS = 7600
EVERYTHING = 10**9  # tokens up to which the computed ones attend to everything


def lengthened(engine: A3Engine, examples: list[Example], at: int) -> Example:
    """A question's passages, evenly spread among others' ones."""
    tokenizer = engine.runtime.tokenizer
    own, others = list(examples[at].passages), []
    n_tokens = sum(len(tokenizer(str(passage)).input_ids) for passage in own)
    for step in range(1, 13):
        for passage in examples[(at + step) % len(examples)].passages:
            more = len(tokenizer(str(passage)).input_ids)
            if n_tokens + more < MOST_TOKENS:
                others.append(passage)
                n_tokens += more
    each, mixed = max(1, len(others) // len(own)), []
    for place, passage in enumerate(own):
        mixed += [passage, *others[place * each : (place + 1) * each]]
    return replace(examples[at], passages=tuple(mixed + others[len(own) * each :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", choices=["first", "second"], default="first")
    parser.add_argument("--limit", type=int, default=14)
    options = parser.parse_args()
    everyone = read_examples(options.data)
    middle = len(everyone) // 2
    examples = everyone[:middle] if options.half == "first" else everyone[middle:]
    engine = A3Engine.from_pretrained("smollm2-135m-instruct")
    found: dict[float, list[tuple[float, float]]] = {0.15: [], 0.05: []}
    for at in range(min(options.limit, len(examples))):
        example = lengthened(engine, examples, at)
        engine.precompute([str(passage) for passage in example.passages], progress=False)
        reference = full_prefill(engine, example)
        for ratio, pairs in found.items():
            ours, whole = (
                fidelity(engine, reference, Method(Mend(ratio, long_tokens=tokens))).kl_answer
                for tokens in (Mend().long_tokens, EVERYTHING)
            )
            pairs.append((ours, whole))
        for ratio, pairs in found.items():
            moves = [ours - whole for ours, whole in pairs]
            error = statistics.stdev(moves) / len(moves) ** 0.5 if len(moves) > 1 else float("nan")
            print(
                f"{len(pairs)} questions @ {ratio}: everything "
                f"{statistics.mean(whole for _, whole in pairs):.4f}, ours "
                f"{statistics.mean(ours for ours, _ in pairs):.4f}, "
                f"difference {statistics.mean(moves):+.4f} ± {error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
