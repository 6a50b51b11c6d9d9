"""kvboost, a cache of chunks on transformers, at its defaults.

Usage: python kv_boost.py MODEL_FOLDER

It takes text only, whose tokens may differ a little from those of the other peers.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from kvboost import KVBoost
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import Answer, keep_stdout, serve


def main() -> None:
    keep_stdout()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    # Its own loader would take fp16.
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    engine = KVBoost(model, tokenizer, max_cache_bytes=2**31)

    def answer(request: dict[str, Any]) -> Answer:
        times: list[float] = []  # after the first token it computes what it stores
        result = engine.generate(
            tokenizer.decode(request["ids"]),
            max_new_tokens=1,
            on_token=lambda _: times.append(time.perf_counter()),
        )
        return Answer(result.output_text, result.cached_tokens, times[0])

    serve(version("kvboost"), answer)


if __name__ == "__main__":
    main()
