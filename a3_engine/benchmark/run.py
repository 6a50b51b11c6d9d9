"""A whole benchmark: every context length and chunk size, every method at every ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm

from a3_engine.benchmark.decoding import measure_decoding
from a3_engine.benchmark.ingestion import measure_ingestion
from a3_engine.benchmark.prompts import QUESTION, chunk_texts, fitting
from a3_engine.benchmark.rates import (
    Rates,
    attention_rate,
    linear_rate,
    machine,
    measure_rates,
)
from a3_engine.benchmark.requests import PARTS, Timed, spread, take_turns
from a3_engine.benchmark.roofline import Shape, work
from a3_engine.engine import A3Engine
from a3_engine.method import Method

Row = dict[str, Any]


def run(
    engine: A3Engine,
    contexts: Sequence[int],
    methods: Sequence[Method],
    *,
    chunk_sizes: Sequence[int],
    repeats: int,
    answer_tokens: int,
    at_once: int = 0,
) -> Row:
    """Measure; nothing else should compute meanwhile.

    A context that the model's window does not hold is cut; see
    :func:`~a3_engine.benchmark.prompts.fitting`. Answers have ``answer_tokens`` only where the
    model does not end them before; decoding is measured from two on.

    Returns
    -------
    dict
        Plain values: ``machine``, ``rates`` (operations and bytes a second), ``ingestion``,
        ``decoding`` and ``results``, one a context, chunk size, method and ratio. Seconds and
        bytes, but for ``*_per_s``.
    """
    model = engine.runtime.model
    ingestion: list[Row] = []
    decoding: list[Row] = []
    measured: list[tuple[Row, dict[Method, list[Timed]], dict[Method, int | None]]] = []
    rates = measure_rates(model.device, model.dtype)
    for size in chunk_sizes:
        for wanted in contexts:
            context = fitting(engine, wanted, size, answer_tokens)
            chunks = chunk_texts(engine.runtime.planner, context, size)
            place = {"context_tokens": context, "chunk_tokens": min(size, context)}
            if at_once:
                decoding.append(
                    place
                    | measure_decoding(
                        engine,
                        chunks,
                        at_once=at_once,
                        answer_tokens=answer_tokens,
                        repeats=repeats,
                    )
                )
            ingestion.append(place | measure_ingestion(engine, chunks, repeats))
            found: dict[Method, list[Timed]] = {method: [] for method in methods}
            peaks: dict[Method, int | None] = {}
            turns = take_turns(
                engine, QUESTION, chunks, methods, repeats=repeats, answer_tokens=answer_tokens
            )
            total = len(methods) * (repeats + 1)
            for method, each in tqdm(turns, desc=f"{context} tokens by {size}", total=total):
                if isinstance(each, Timed):
                    found[method].append(each)
                else:
                    peaks[method] = each
            measured.append((place, found, peaks))
            # The limit is what the machine does at best, at some time of the run.
            rates = rates.best(measure_rates(model.device, model.dtype))
    results = [
        place | _summary(engine, method, timed, peaks[method], rates)
        for place, found, peaks in measured
        for method, timed in found.items()
    ]
    return {
        "machine": machine(model.device, model.dtype),
        "rates": {name: round(rate) for name, rate in asdict(rates).items()},
        "ingestion": ingestion,
        "decoding": decoding,
        "results": results,
    }


def _summary(
    engine: A3Engine, method: Method, timed: Sequence[Timed], peak: int | None, rates: Rates
) -> Row:
    report = timed[-1].report
    by_time = sorted(timed, key=lambda each: each.report.ttft_s)
    middle = by_time[(len(timed) - 1) // 2]
    decoded = [each.decode_per_s for each in timed if each.report.generated_tokens > 1]
    return {
        "method": method.name,
        "ratio": method.selector.ratio,
        "dtype": str(engine.runtime.model.dtype).removeprefix("torch."),
        "prompt_tokens": report.prompt_tokens,
        "recomputed_tokens": report.recomputed_tokens,
        "fresh_tokens": report.fresh_tokens,
        "ttft_s": spread([each.report.ttft_s for each in timed]),
        # Of one request, so that they add up.
        "parts_s": {part: round(middle.parts[part], 5) for part in PARTS},
        "decode_per_s": spread(decoded, 2) if decoded else None,
        "bytes_read": report.bytes_read,
        "kv_bytes": report.kv_bytes,
        "peak_bytes": peak,
        "load_to_copy": _load_to(timed, lambda each: each.copy_s),
        "load_to_new_copy": _load_to(timed, lambda each: each.new_copy_s),
        "roofline": _roofline(engine, method, timed, rates),
    }


def _load_to(timed: Sequence[Timed], copying: Callable[[Timed], float]) -> float | None:
    """Loading as a multiple of a plain copy of the same bytes, medians of both."""
    if not timed[-1].report.bytes_read:
        return None
    loading = statistics.median(each.parts["load"] for each in timed)
    return round(loading / statistics.median(map(copying, timed)), 2)


def _roofline(engine: A3Engine, method: Method, timed: Sequence[Timed], rates: Rates) -> Row | None:
    """The pass beside its limit; a sparse method's rows do not stand where their positions say."""
    if method.selector.leaves_out:
        return None
    model, report = engine.runtime.model, timed[-1].report
    assert report.trace is not None
    n_tokens = report.prompt_tokens
    shape = Shape.of(model.config)
    rows = [torch.arange(n_tokens)] * shape.layers
    if method.selector.ratio < 1.0:
        fresh = report.trace.prompt.layout(engine.runtime.planner.prefix_ids).fresh
        rows = [
            torch.unique(torch.cat([torch.tensor(recomputed, dtype=torch.long), fresh]))
            for recomputed in report.trace.recomputed_by_layer(shape.layers)
        ]
    needed = work(shape, rows, model.dtype.itemsize, report.trace.local_global)
    n_rows = len(rows[0])
    linear, attention = linear_rate(model, n_rows), attention_rate(model, n_rows, n_tokens)
    limit = needed.seconds(rates.matmul, rates.copy)
    at_shapes = needed.seconds(linear, rates.copy, attention)
    measured = statistics.median(each.pass_s for each in timed)
    return {
        "rows": n_rows,
        "flops": needed.flops,
        "bytes": needed.nbytes,
        "linear_flops_per_s": round(linear),
        "attention_flops_per_s": round(attention),
        "limit_s": round(limit, 5),
        "limit_at_shapes_s": round(at_shapes, 5),
        "pass_s": round(measured, 5),
        "pass_to_limit": round(measured / limit, 2),
        "pass_to_limit_at_shapes": round(measured / at_shapes, 2),
    }
