"""Time to first token beside the plain Hugging Face integrations of both frameworks.

The same model folder, messages and sampling, through four classes: `HuggingFaceLLM` and `A3LLM` in
LlamaIndex, `ChatHuggingFace` over `HuggingFacePipeline` and `ChatA3` in LangChain. Every round asks
all four the same question over 3,000 tokens of passages in a new order, so that no prefix repeats;
they take turns, and the first round, which loads, warms up and stores the passages, is not counted.
The clock runs from the call to the end of a stream of one token, through the framework.

    pip install -e ".[gguf,llama-index,langchain,compare]"   # in a checkout

Both accept transformers 5 (langchain-huggingface 1.2 wants huggingface-hub below 2, which
transformers 5.23 takes too).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from langchain_core.messages import HumanMessage
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.huggingface import HuggingFaceLLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from a3_engine import A3Engine
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.langchain import ChatA3
from a3_integrations.llama_index import A3LLM

QUESTION = "Which of these places is the largest city by population?"
PROMPT = "Context information is below.\n\n{context}\n\nAnswer the query: {question}"


def passages(engine: A3Engine, tokens: int) -> list[str]:
    """Paragraphs of real text with about so many tokens together."""
    count = engine.runtime.planner.chunk_ids
    chosen: list[str] = []
    for paragraph in (
        p.strip() for _, paragraphs in articles(sample_examples()) for p in paragraphs
    ):
        if sum(len(count(text)) for text in [*chosen, paragraph]) <= tokens:
            chosen.append(paragraph)
    return chosen


def peers(folder: str, dtype: torch.dtype, device: str) -> tuple[HuggingFaceLLM, ChatHuggingFace]:
    """The two plain integrations on one loaded model, greedy, one token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, do_sample=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama_index = HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer,
        context_window=model.config.max_position_embeddings,
        max_new_tokens=1,
        is_chat_model=True,
    )
    # The limit is the pipeline's: no request reads HuggingFacePipeline(pipeline_kwargs=...).
    settings = {"max_new_tokens": 1, "do_sample": False}
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, **settings)
    langchain = HuggingFacePipeline(pipeline=generate)
    return llama_index, ChatHuggingFace(llm=langchain, tokenizer=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=3000, help="of retrieved context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="a3-compare-") as store:
        loaded = A3Engine.from_pretrained(options.model).runtime.model
        folder = loaded.config._name_or_path
        engine = A3Engine.from_pretrained(folder, cache_dir=store)
        texts = passages(engine, options.tokens)
        engine.precompute(texts)
        plain_llama_index, plain_langchain = peers(folder, loaded.dtype, str(loaded.device))
        a3_llama_index = A3LLM(engine=engine, max_new_tokens=1)
        a3_langchain = ChatA3(engine=engine, max_tokens=1)

        ask: dict[str, Callable[[str], object]] = {
            "LlamaIndex HuggingFaceLLM": lambda prompt: list(
                plain_llama_index.stream_chat([ChatMessage(role="user", content=prompt)])
            ),
            "LlamaIndex A3LLM": lambda prompt: list(
                a3_llama_index.stream_chat([ChatMessage(role="user", content=prompt)])
            ),
            "LangChain ChatHuggingFace": lambda prompt: list(
                plain_langchain.stream([HumanMessage(prompt)])
            ),
            "LangChain ChatA3": lambda prompt: list(a3_langchain.stream([HumanMessage(prompt)])),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ask}
        shuffled = random.Random(11)
        for turn in tqdm(range(options.rounds + 1), desc="Rounds", disable=options.json):
            shuffled.shuffle(texts)
            prompt = PROMPT.format(context="\n\n".join(texts), question=QUESTION)
            for name, call in ask.items():
                started = time.perf_counter()
                call(prompt)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        report = a3_llama_index.last_report
        assert report is not None
        assert report.misses == 0
        result = {
            "model": options.model,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "prompt_tokens": report.prompt_tokens,
            "cached_tokens": report.cached_tokens,
            "selector": report.selector,
            "ratio": report.ratio,
            "ttft_s": {
                name: {
                    "median": round(statistics.median(times), 4),
                    "min": round(min(times), 4),
                    "max": round(max(times), 4),
                }
                for name, times in seconds.items()
            },
        }
        engine.close()
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['prompt_tokens']} prompt tokens, {result['cached_tokens']} of them cached:")
    for name, times in result["ttft_s"].items():
        print(f"  {name:<28} {times['median']:.3f} s  ({times['min']:.3f} to {times['max']:.3f})")


if __name__ == "__main__":
    main()
