"""transformers with the cache of the last prompt, cropped to what the next one begins with alike.

Usage: python transformers_cache.py MODEL_FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import Any

import torch
import transformers
from worker import Answer, keep_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    keep_stdout()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    cache, cached_ids = transformers.DynamicCache(config=model.config), []

    def answer(request: dict[str, Any]) -> Answer:
        nonlocal cached_ids
        ids = request["ids"]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(cached_ids, ids[:-1], strict=False))
        reused = sum(1 for _ in alike)
        if (surplus := cache.get_seq_length() - reused) > 0:
            cache.crop(-surplus)
        output = model.generate(
            torch.tensor([ids]), past_key_values=cache, max_new_tokens=1, do_sample=False
        )
        cached_ids = ids
        return Answer(tokenizer.decode(output[0, -1:]), reused)

    serve(transformers.__version__, answer)


if __name__ == "__main__":
    main()
