"""Our own engine, its chunks on a warm disk. Usage: python a3.py MODEL_FOLDER [--dtype bfloat16]

A method is a selector, with a ratio where it has one: ``full_prefill``, ``mend@0.15``. The full
prefill is that of transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import transformers
from worker import Answer, keep_stdout, serve

from a3_engine import A3Engine, Prompt, __version__
from a3_engine.segments import Segment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    keep_stdout()
    with tempfile.TemporaryDirectory(prefix="a3-peers-") as store:
        engine = A3Engine.from_pretrained(options.model, cache_dir=store, dtype=options.dtype)
        _ = engine.runtime  # load the model before any request comes

        def answer(request: dict[str, Any]) -> Answer:
            selector, _, ratio = request["method"].partition("@")
            result = engine.generate(
                prompt_of(request["ids"], request["chunks"]),
                selector=selector,
                ratio=float(ratio) if ratio else None,
                max_new_tokens=1,
            )
            report = result.report
            if not report.fused and selector != "full_prefill":
                raise RuntimeError(f"{selector} fell back: {report.fallback_reason}")
            return Answer(result.text, report.cached_tokens - report.recomputed_tokens)

        serve(f"{__version__}, transformers {transformers.__version__}", answer)
        engine.close()


def prompt_of(ids: list[int], chunks: list[list[int]]) -> Prompt:
    """The template's head, chunks without anything between them, and the question."""
    first, last = chunks[0][0], chunks[-1][1]
    cached = [Segment("chunk", tuple(ids[start:stop])) for start, stop in chunks]
    head, question = Segment("prefix", tuple(ids[:first])), Segment("fresh", tuple(ids[last:]))
    return Prompt((head, *cached, question), 1 + len(chunks))


if __name__ == "__main__":
    main()
