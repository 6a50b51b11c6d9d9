"""OpenVINO GenAI with its prefix cache. Usage: python open_vino.py IR_FOLDER

It computes in bf16 where the processor does, whatever the weights are stored in. It does not say
how many tokens it reused.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Answer, keep_stdout, serve


def main() -> None:
    keep_stdout()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = 2  # GiB
    scheduler.max_num_batched_tokens = 8192  # the prompt in one step
    pipe = openvino_genai.LLMPipeline(
        sys.argv[1],
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=int(os.environ["OMP_NUM_THREADS"]),
    )
    tokenizer = pipe.get_tokenizer()
    config = openvino_genai.GenerationConfig(max_new_tokens=1)

    def answer(request: dict[str, Any]) -> Answer:
        ids = openvino.Tensor(np.array([request["ids"]], dtype=np.int64))
        result = pipe.generate(ids, config)
        return Answer(tokenizer.decode(result.tokens[0]), None)

    serve(openvino_genai.__version__, answer)


if __name__ == "__main__":
    main()
