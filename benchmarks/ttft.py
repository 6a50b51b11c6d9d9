"""Time to first token by method and length of the context, on the demo model.

Full prefill is transformers' ordinary forward (sdpa, same dtype, same token ids). What fusing takes
is inside the clock: reading every chunk from a warm disk, rotating, selecting, recomputing. Methods
take turns (A B A B); the result is the median with the spread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile

import torch
from tqdm import tqdm

from a3_engine import A3Engine, Message, Prompt
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_engine.model.loading import default_cache_dir, load_model
from a3_engine.prompt import Segment

QUESTION = "\n\nAnswer in one sentence: which of these places is the largest city by population?"


def machine() -> dict[str, object]:
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
        name = ", ".join(sorted(models)) or name
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def build_prompt(engine: A3Engine, context_tokens: int, chunk_tokens: int) -> Prompt:
    """``context_tokens`` of real text in chunks of exactly ``chunk_tokens``, and a question."""
    planner = engine.runtime.planner
    text = "\n\n".join(p for _, paragraphs in articles(sample_examples()) for p in paragraphs)
    ids = planner.tokenize_text(text)
    if len(ids) < context_tokens:
        raise SystemExit(f"The sample has {len(ids)} tokens; --contexts goes up to that.")
    prefix, *question = planner.plan([Message("user", QUESTION)]).segments
    chunks = [
        Segment("chunk", ids[start : min(start + chunk_tokens, context_tokens)])
        for start in range(0, context_tokens, chunk_tokens)
    ]
    return Prompt((prefix, *chunks, *question), 1 + len(chunks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="1024,2048,4096,7168", help="context lengths, tokens")
    parser.add_argument("--methods", default="full_prefill,full_reuse,a3")
    parser.add_argument("--ratio", type=float, default=0.15, help="for methods that have one")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default=None, help="bfloat16 or float32; the machine's default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    model, tokenizer = load_model(
        "smollm2-135m-instruct", cache_dir=default_cache_dir(), dtype=options.dtype
    )
    methods = options.methods.split(",")
    results = []
    with tempfile.TemporaryDirectory(prefix="a3-bench-") as store:
        engine = A3Engine.from_pretrained(model, tokenizer, cache_dir=store)
        for context in map(int, options.contexts.split(",")):
            prompt = build_prompt(engine, context, options.chunk_tokens)
            seconds: dict[str, list[float]] = {method: [] for method in methods}
            # The first round stores the chunks and warms up; it is not counted.
            rounds = tqdm(range(options.repeats + 1), desc=f"{context} tokens", file=sys.stderr)
            for turn in rounds:
                for method in methods:
                    ratio = None if method.startswith("full_") else options.ratio
                    report = engine.generate(
                        prompt, selector=method, ratio=ratio, max_new_tokens=1
                    ).report
                    assert report.fused == (method != "full_prefill"), report.fallback_reason
                    if turn:
                        assert report.misses == 0
                        seconds[method].append(report.ttft_s)
            for method, times in seconds.items():
                results.append(
                    {
                        "method": method,
                        "context_tokens": context,
                        "ratio": report_ratio(method, options.ratio),
                        "dtype": str(model.dtype).removeprefix("torch."),
                        "ttft_s": {
                            "median": round(statistics.median(times), 4),
                            "min": round(min(times), 4),
                            "max": round(max(times), 4),
                        },
                    }
                )
        engine.close()
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
    else:
        show(results)


def report_ratio(method: str, ratio: float) -> float:
    return {"full_prefill": 1.0, "full_reuse": 0.0}.get(method, ratio)


def show(results: list[dict]) -> None:
    reference = {
        row["context_tokens"]: row["ttft_s"]["median"]
        for row in results
        if row["method"] == "full_prefill"
    }
    print(" context method         ratio    median      min      max  sooner")
    for row in results:
        times = row["ttft_s"]
        base = reference.get(row["context_tokens"])
        sooner = f"{base / times['median']:.1f}x" if base else ""
        print(
            f"{row['context_tokens']:>8} {row['method']:<14} {row['ratio']:>5} "
            f"{times['median']:>8.3f}s {times['min']:>7.3f}s {times['max']:>7.3f}s {sooner:>7}"
        )


if __name__ == "__main__":
    main()
