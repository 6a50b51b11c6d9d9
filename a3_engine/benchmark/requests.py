"""Requests side by side: where the time to the first token goes, and what follows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from a3_engine.benchmark.memory import peak_growth
from a3_engine.benchmark.rates import copy_seconds, now
from a3_engine.engine import A3Engine
from a3_engine.method import Method
from a3_engine.report import FusionReport

# In the order in which they happen; select comes inside recompute for methods that choose there.
PARTS = ("plan", "load", "select", "recompute", "first_token", "other")


class Timed(NamedTuple):
    """One request: what its report says, and the seconds of each of `PARTS`.

    Right after it, as many bytes as it read were copied in ``copy_s`` seconds from the host's
    memory into the device's at hand, and in ``new_copy_s`` into memory that the system has yet to
    hand out, page by page.
    """

    report: FusionReport
    parts: dict[str, float]
    copy_s: float = 0.0
    new_copy_s: float = 0.0

    @property
    def pass_s(self) -> float:
        """From the hidden states of the prompt's rows to the first token."""
        return self.parts["recompute"] + self.parts["first_token"]

    @property
    def decode_per_s(self) -> float:
        """Tokens a second after the first."""
        return (self.report.generated_tokens - 1) / self.report.decode_s


def take_turns(
    engine: A3Engine,
    question: str,
    chunks: Sequence[str],
    methods: Sequence[Method],
    *,
    repeats: int,
    answer_tokens: int,
) -> Iterator[tuple[Method, Timed | int | None]]:
    """Every method's request, again and again, the methods in turn.

    A first round stores missing chunks and warms up; it is not handed out. A last one measures
    memory: it gives freed memory back first, which would make a request slower. On a GPU each round
    has a longer question, since some of its libraries prepare for every new length.

    Yields
    ------
    Method and `Timed`
        ``repeats`` times a method.
    Method and int or None
        At last, the bytes by which memory grew at most, where it can be known.
    """
    turns = [method for _ in range(repeats + 1) for method in methods]
    device = engine.runtime.model.device
    for number, method in enumerate(turns):
        longer = " Think." * (number // len(methods)) if device.type == "cuda" else ""
        engine.runtime.prefix_cache.clear()  # what an earlier request left is no part of this one
        timed = timed_request(engine, question + longer, chunks, method, answer_tokens)
        if number >= len(methods):
            assert timed.report.misses == 0
            copied = copy_seconds(timed.report.bytes_read, torch.device("cpu"), device)
            yield method, Timed(timed.report, timed.parts, *copied)
    for method in methods:
        engine.runtime.prefix_cache.clear()
        request = partial(timed_request, engine, question, chunks, method, answer_tokens)
        yield method, peak_growth(request, engine.runtime.model.device)


def timed_request(
    engine: A3Engine, question: str, chunks: Sequence[str], method: Method, answer_tokens: int
) -> Timed:
    """One request, which has to be served as the method wants it.

    Raises
    ------
    ValueError
        The model is not fused; the message says why.
    """
    with _logits_begin(engine) as begins:
        started = time.perf_counter()
        report = engine.generate(
            question,
            chunks=chunks,
            selector=method.selector,
            compression=method.compression,
            max_new_tokens=answer_tokens,
        ).report
    if not report.fused and method.selector.uses_chunks:
        raise ValueError(f"There is nothing to measure: {report.fallback_reason}.")
    # The model computes logits once a token of the answer, and for drafts before it.
    # The report's clock starts a moment after ours.
    first_token = max(0.0, started + report.ttft_s - begins[-report.generated_tokens])
    parts = {
        "plan": report.plan_s,
        "load": report.load_s,
        "select": report.select_s,
        "recompute": report.recompute_s - first_token,
        "first_token": first_token,
    }
    parts["other"] = report.ttft_s - report.encode_s - sum(parts.values())
    return Timed(report, parts)


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


@contextmanager
def _logits_begin(engine: A3Engine) -> Iterator[list[float]]:
    """Meanwhile collects when the model begins to compute logits."""
    model, times = engine.runtime.model, []

    def hook(*_: Any) -> None:
        times.append(now(model.device))

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield times
    finally:
        handle.remove()
