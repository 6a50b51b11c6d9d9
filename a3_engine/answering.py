"""One request: fetch and fuse its chunks, decode, and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from a3_engine.decoding.generate import Sampling, decode
from a3_engine.decoding.streaming import TextEmitter
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.drift import Drift
from a3_engine.fusion.fuse import Abandoned, FusionPass
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.scoring import question_attention
from a3_engine.fusion.selectors.base import LayerSelector, QuestionSelector, Selector
from a3_engine.fusion.selectors.full_prefill import FullPrefill
from a3_engine.prompt import Prompt
from a3_engine.report import ChunkUse, FusionReport
from a3_engine.runtime import Runtime


def why_prefill(runtime: Runtime, prompt: Prompt, selector: Selector, room: int) -> str | None:
    """Why a request takes the ordinary way; None if it can be fused."""
    support = runtime.support
    if isinstance(selector, FullPrefill):
        return "full_prefill was asked for"
    if support.rotation is None:
        return support.reason
    limit = support.rotation.max_tokens
    if limit is not None and prompt.n_tokens + room > limit:
        return f"longrope changes its frequencies beyond {limit} tokens"
    if not any(segment.kind == "chunk" for segment in prompt.segments):
        return "the prompt holds no known chunk"
    return None


def assemble(
    runtime: Runtime,
    prompt: Prompt,
    selector: Selector,
    room: int,
    report: FusionReport,
    abandoned: Callable[[], bool] = lambda: False,
) -> FusedCache:
    """Fetch the chunks and lay them into a cache, with the pass that will complete it."""
    assert runtime.library is not None
    assert runtime.support.rotation is not None
    started = time.perf_counter()
    loaded = []
    for start, segment in prompt.cached:
        if abandoned():
            raise Abandoned
        fetched = runtime.library.fetch(segment)
        loaded.append((start, fetched.kv))
        report.encode_s += fetched.seconds
        if segment.kind == "chunk":
            report.chunks.append(
                ChunkUse(segment.text, len(segment.ids), fetched.hit, fetched.nbytes)
            )
        if fetched.hit:
            report.cached_tokens += len(segment.ids)
        else:
            report.created_tokens += len(segment.ids)
    with runtime.computing:
        cache = allocate(runtime.model, prompt.n_tokens, prompt.n_tokens + room)
        load_chunks(cache, runtime.support.rotation, loaded)
        report.load_s = time.perf_counter() - started - report.encode_s
        layout = prompt.layout(runtime.library.prefix_ids)
        drift = (
            Drift(selector.repair, layout, runtime.support.rotation) if selector.repair else None
        )
        fusion = FusionPass(cache, layout, selector, abandoned, drift)
        if isinstance(selector, QuestionSelector) and fusion.selected is None:
            layers = selector.layers(len(cache.layers))
            attention = question_attention(
                runtime.model.get_decoder(), cache, fusion, prompt.ids, layers
            )
            fusion.take(selector.select(layout, attention))
    return cache


def answer(
    runtime: Runtime,
    prompt: Prompt,
    selector: Selector,
    sampling: Sampling,
    started: float,
    emit: Callable[[str], None],
    abandoned: Callable[[], bool],
) -> FusionReport:
    """Answer a prompt that fits; ``started`` is when the request came, by ``perf_counter``."""
    report = FusionReport(
        model=runtime.name,
        selector=selector.name,
        ratio=selector.ratio,
        prompt_tokens=prompt.n_tokens,
        fallback_reason=why_prefill(runtime, prompt, selector, sampling.max_new_tokens),
    )
    emitter = TextEmitter(runtime.tokenizer, emit, sampling.stop)
    cache = None
    try:
        if report.fused:
            cache = assemble(runtime, prompt, selector, sampling.max_new_tokens, report, abandoned)
        with runtime.computing:
            if abandoned():
                raise Abandoned
            began = time.perf_counter()
            report.finish_reason = decode(
                runtime.model,
                runtime.tokenizer,
                prompt.ids,
                cache,
                sampling,
                emitter,
                abandoned,
            )
            ended = time.perf_counter()
    except Abandoned:
        return replace(report, finish_reason="abandoned")
    report.fresh_tokens = prompt.n_tokens - report.cached_tokens - report.created_tokens
    report.generated_tokens = emitter.n_tokens
    first = emitter.first_token_at or ended
    report.ttft_s, report.decode_s = first - started, ended - first
    report.recompute_s = first - began
    if cache is not None and cache.fusion is not None:
        fusion = cache.fusion
        report.select_s = fusion.select_seconds
        if isinstance(selector, LayerSelector):  # it selects inside the pass
            report.recompute_s -= report.select_s
        report.recomputed_tokens = 0 if fusion.selected is None else len(fusion.selected)
    return report
