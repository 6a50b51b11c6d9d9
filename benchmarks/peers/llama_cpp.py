"""llama.cpp's server, inside the process, with its prompt cache.

Usage: python llama_cpp.py MODEL.gguf [--reuse TOKENS]

``--reuse`` is llama.cpp's ``n_cache_reuse``: equal runs of at least so many tokens are kept from
the slot's last prompt and shifted to where they now stand, and nothing of them is computed again.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import xllamacpp
from worker import Answer, keep_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--reuse", type=int, default=0)
    options = parser.parse_args()
    keep_stdout()

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx = 8192
    params.n_parallel = 1
    threads = int(os.environ["OMP_NUM_THREADS"])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_cache_reuse = options.reuse
    params.cache_ram_mib = 0  # one slot, whose last prompt is all that is kept
    server = xllamacpp.Server(params)

    def answer(request: dict[str, Any]) -> Answer:
        reply = server.handle_completions(
            {
                "prompt": request["ids"],
                "n_predict": 1,
                "temperature": 0.0,
                "cache_prompt": True,
            }
        )
        return Answer(reply["choices"][0]["text"], reply["timings"]["cache_n"])

    serve(xllamacpp.__version__, answer)


if __name__ == "__main__":
    main()
