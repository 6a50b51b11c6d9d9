"""vLLM on the CPU in bf16, with its prefix cache. Usage: python vllm_cpu.py MODEL_FOLDER

In one process, where it uses all threads that OMP_NUM_THREADS gives it: with a worker of its own it
keeps one core free. Without torch.compile, which costs a minute and a half at every start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from worker import Answer, keep_stdout, serve

SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "LD_PRELOAD": str(Path(sys.prefix, "lib", "libiomp5.so")),  # as vLLM's manual says
}


def main() -> None:
    if not SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    keep_stdout()
    import vllm  # it prints while it is imported

    llm = vllm.LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=8192,
        max_num_batched_tokens=8192,  # the prompt in one step
        max_num_seqs=1,
        enable_prefix_caching=True,
        enforce_eager=True,
        kv_cache_memory_bytes=2**30,
    )
    one_token = vllm.SamplingParams(temperature=0.0, max_tokens=1)

    def answer(request: dict[str, Any]) -> Answer:
        prompt = {"prompt_token_ids": request["ids"]}
        (result,) = llm.generate(prompt, one_token, use_tqdm=False)
        return Answer(result.outputs[0].text, result.num_cached_tokens)

    serve(vllm.__version__, answer)


if __name__ == "__main__":
    main()
