"""How fast answers go on: one request, several at once, and transformers' own `generate`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from a3_engine.benchmark.prompts import QUESTION
from a3_engine.benchmark.rates import now
from a3_engine.benchmark.requests import spread
from a3_engine.engine import A3Engine
from a3_engine.fusion.cache import FusedCache
from a3_engine.model.batch_cache import step
from a3_engine.model.hooks import run_pass
from a3_engine.report import FusionReport
from a3_engine.segments import Prompt


class _Clock(StoppingCriteria):
    """Takes the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_decoding(
    engine: A3Engine, chunks: Sequence[str], *, at_once: int, answer_tokens: int, repeats: int
) -> dict[str, Any]:
    """Tokens a second, taking turns; the first round warms up and is not counted.

    Requests are fused by full reuse. ``one`` and ``generate`` count the tokens after the first, by
    the time between them. ``request`` and ``at_once`` count all tokens, by the time from the call
    to the last token of the last answer: of one request in a thread, and of all. ``step`` and
    ``steps`` are the model's steps alone, for one cache and for all, with no token chosen.
    """
    prompt = engine.plan(QUESTION, chunks)
    inputs = torch.tensor([list(prompt.ids)], device=engine.runtime.model.device)

    def ask(_: int) -> FusionReport:
        return engine.generate(
            prompt, selector="full_reuse", max_new_tokens=answer_tokens, temperature=1.0
        ).report

    def together(pool: ThreadPoolExecutor, requests: int) -> float:
        engine.runtime.prefix_cache.clear()  # what an earlier request left is no part of this one
        started = time.perf_counter()
        list(pool.map(ask, range(requests)))
        return requests * answer_tokens / (time.perf_counter() - started)

    def stepping(requests: int) -> float:
        started = now(model.device)
        for _ in range(answer_tokens):
            step(model, [0] * requests, caches[:requests], model.device)
        return requests * answer_tokens / (now(model.device) - started)

    model, executor = engine.runtime.model, engine.runtime.executor
    caches = [executor.run(partial(_prefilled, engine, prompt)) for _ in range(at_once)]
    found: dict[str, list[float]] = defaultdict(list)
    executor.release_helpers()  # the machine's rates were measured in this thread
    with ThreadPoolExecutor(at_once) as pool:
        for turn in range(repeats + 1):
            clock = _Clock()
            plain = partial(
                model.generate,
                inputs,
                max_new_tokens=answer_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            executor.run(plain)  # in another thread it would hinder the rest
            engine.runtime.prefix_cache.clear()
            alone = pool.submit(ask, 0).result()
            round_ = {
                "one": (alone.generated_tokens - 1) / alone.decode_s,
                "generate": (len(clock.times) - 1) / (clock.times[-1] - clock.times[0]),
                "request": together(pool, 1),
                "at_once": together(pool, at_once),
                "step": executor.run(partial(stepping, 1)),
                "steps": executor.run(partial(stepping, at_once)),
            }
            if turn:
                for name, value in round_.items():
                    found[name].append(value)
    return {"requests": at_once} | {
        f"{name}_per_s": spread(values, 2) for name, values in found.items()
    }


def _prefilled(engine: A3Engine, prompt: Prompt) -> FusedCache:
    _, cache = engine.prepare(prompt, selector="full_reuse")
    run_pass(engine.runtime.model.get_decoder(), [prompt.ids], cache)
    return cache
