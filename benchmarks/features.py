"""What the two tables of features share: loading, asking, and writing rows."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here; a class that asks the hub fails

from transformers import AutoModelForCausalLM, AutoTokenizer

from a3_engine import A3Engine

PROMPT = "Name the colours of the rainbow."
PASSAGES = [
    f"The mill number {n} ground corn in the valley until the year 19{n}." for n in (11, 27)
]


@contextmanager
def both_ways() -> Iterator[tuple[A3Engine, Any, Any]]:
    """An engine with a store of its own, and the same model folder's plain model and tokenizer."""
    with tempfile.TemporaryDirectory(prefix="a3-features-") as store:
        demo = A3Engine.from_pretrained("smollm2-135m-instruct")
        folder = demo.runtime.model.config._name_or_path
        demo.close()
        engine = A3Engine.from_pretrained(folder, cache_dir=store)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=engine.runtime.model.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.generation_config.pad_token_id = tokenizer.eos_token_id
        yield engine, model, tokenizer
        engine.close()


def event_loop_is_free(answer: Callable[[], Awaitable[object]]) -> bool:
    """Whether a clock in the same loop goes on while an answer is computed."""

    async def run() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        await answer()
        ticker.cancel()
        return ticks

    return asyncio.run(run()) > 5


def works(probe: Callable[[Any], bool], subject: Any) -> str:
    """A table's cell: what a probe says; one that raises says no."""
    try:
        return "yes" if probe(subject) else "no"
    except Exception as error:  # a probe may fail in any way that the classes do
        return f"no ({type(error).__name__})"


def table_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
