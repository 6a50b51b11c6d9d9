"""One request: fetch and fuse its chunks, decode, and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from a3_engine.chunks.library import ChunkLibrary
from a3_engine.chunks.patience import one_request
from a3_engine.decoding.generate import decode
from a3_engine.decoding.logprobs import RecordLogprobs
from a3_engine.decoding.sampling import Sampling
from a3_engine.decoding.text_emitter import TextEmitter
from a3_engine.errors import ContextOverflowError, UnsupportedModelError
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fusion_pass import Abandoned, FusionPass
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.prefix_cache import CachedPrefix
from a3_engine.fusion.selection import begin
from a3_engine.fusion.selectors.base import Selector, SparseSelector
from a3_engine.fusion.selectors.full_prefill import FullPrefill
from a3_engine.kv import ChunkKV
from a3_engine.method import Method
from a3_engine.model.attention import install
from a3_engine.report import ChunkUse, FusionReport, Trace
from a3_engine.runtime import Runtime
from a3_engine.segments import Prompt, Segment

logger = logging.getLogger(__name__)


def check_room(prompt_tokens: int, max_new_tokens: int, context_window: int) -> None:
    """Raise `ContextOverflowError` where a prompt and its answer do not fit."""
    if (excess := prompt_tokens + max_new_tokens - context_window) > 0:
        raise ContextOverflowError(
            f"The prompt has {prompt_tokens} tokens and the answer may take {max_new_tokens}, "
            f"together {excess} more than the model's context window of {context_window}. Retrieve "
            "fewer or shorter chunks, lower max_new_tokens, or use a model with a longer context. "
            "Nothing was cut."
        )


def why_not_kept(runtime: Runtime, prompt: Prompt, room: int) -> str | None:
    """Why keys and values of this request serve no other one; None if they can."""
    gate = runtime.gate
    if gate.rotation is None:
        return gate.reason
    limit = gate.rotation.max_tokens
    if limit is not None and prompt.n_tokens + room > limit:
        return f"longrope changes its frequencies beyond {limit} tokens"
    return None


def why_prefill(runtime: Runtime, prompt: Prompt, method: Method, room: int) -> str | None:
    """Why a request takes the ordinary way; None if it can be fused."""
    if isinstance(method.selector, FullPrefill) and method.compression is None:
        return "full_prefill was asked for"
    if (reason := why_not_kept(runtime, prompt, room)) is not None:
        return reason
    has_chunks = any(segment.kind == "chunk" for segment in prompt.segments)
    if not has_chunks and method.compression is None:
        return "the prompt holds no known chunk"
    return None


def assemble(
    runtime: Runtime,
    prompt: Prompt,
    method: Method,
    room: int,
    report: FusionReport,
    abandoned: Callable[[], bool] = lambda: False,
    turn: CachedPrefix | None = None,
    reused: int = 0,
) -> FusedCache:
    """Lay chunks, behind ``reused`` tokens of a turn, into a cache with the pass to complete it."""
    if runtime.library is None or runtime.gate.rotation is None:
        raise UnsupportedModelError(
            f"{runtime.name} cannot be fused: {runtime.gate.reason}. generate and stream "
            "answer by ordinary prefill."
        )
    selector, rotation, library = method.selector, runtime.gate.rotation, runtime.library
    started = time.perf_counter()
    used = segments_used(library, prompt, selector)
    head = _head(library, prompt)
    layout = prompt.layout(library.prefix_ids, reused, len(head.ids) if head else None)
    report.reused_turn_tokens = report.cached_tokens = reused
    # A full prefill with compression runs as a fusion pass that needs no chunk.
    cached = () if isinstance(selector, FullPrefill) else prompt.cached
    for start, segment in cached:
        if segment.kind == "chunk" and start + len(segment.ids) <= reused:
            report.chunks.append(ChunkUse(segment.text, len(segment.ids), True, 0))
    wanted = [(start, segment) for start, segment in cached if start >= reused]
    kv_at: dict[int, ChunkKV] = {}
    fetching = library.fetch_all([segment for _, segment in wanted], used)
    for start, segment in wanted:
        if abandoned():
            raise Abandoned
        fetched = next(fetching)
        kv_at[start] = fetched.kv
        report.encode_s += fetched.seconds
        if segment.kind == "chunk":
            report.chunks.append(
                ChunkUse(segment.text, len(segment.ids), fetched.hit, fetched.nbytes)
            )
        if fetched.hit:
            report.cached_tokens += len(segment.ids)
        else:
            report.created_tokens += len(segment.ids)
    behind: dict[tuple[int, ...], ChunkKV | None] = {(): None}
    if isinstance(selector, SparseSelector):  # the thread that computes must not fetch
        behind |= {one.ids: library.fetch(one, used).kv for one in _behind(library, prompt)}
    local = partial(_local_queries, runtime, prompt, dict(kv_at), behind)
    over: list[tuple[int, ChunkKV]] = []
    laid = [segment for _, segment in wanted]
    if head is not None and layout.chunks and (start := layout.chunks[0].start) in kv_at:
        fetched = library.fetch(head, used)
        report.encode_s += fetched.seconds
        over.append((start, fetched.kv))
        laid.append(head)
    compressor = method.compression.start() if method.compression else None

    def lay_out() -> FusedCache:
        cache = allocate(runtime.model, prompt.n_tokens, prompt.n_tokens + room)
        if compressor is not None and any(layer.shape.latent for layer in cache.layers):
            raise ValueError(
                "A compression keeps other tokens for each head, and the model keeps one latent "
                "for all heads. Choose none for this model."
            )
        brought = load_chunks(cache, rotation, list(kv_at.items()), over)
        cache.on_device = list(zip(laid, brought, strict=False))
        if turn is not None:
            turn.copy_to(cache, reused)
        report.load_s = time.perf_counter() - started - report.encode_s
        return begin(
            runtime.model,
            rotation,
            cache,
            layout,
            selector,
            prompt.ids,
            local_queries=local,
            room=room,
            abandoned=abandoned,
            observer=compressor.observe if compressor else None,
        )

    cache = runtime.executor.run(lay_out)
    cache.compressor = compressor
    return cache


def segments_used(library: ChunkLibrary, prompt: Prompt, selector: Selector) -> list[Segment]:
    """What a fused prompt is made of that lies in the store."""
    if isinstance(selector, FullPrefill):
        return []
    used = [segment for _, segment in prompt.cached]
    if (head := _head(library, prompt)) is not None:
        used.append(head)
    return used + _behind(library, prompt) if isinstance(selector, SparseSelector) else used


def _head(library: ChunkLibrary, prompt: Prompt) -> Segment | None:
    """The head of the first chunk, where that opens the prompt just behind the encode prefix."""
    before: list[int] = []
    for segment in prompt.segments:
        if segment.kind == "chunk":
            return library.head(segment) if tuple(before) == library.prefix_ids else None
        before += segment.ids
    return None


def _behind(library: ChunkLibrary, prompt: Prompt) -> list[Segment]:
    """What the prompt's chunks were computed behind."""
    ids = {library.behind(segment): None for _, segment in prompt.cached}
    return [Segment("prefix", each) for each in ids if each]


def touch(runtime: Runtime, prompt: Prompt, selector: Selector) -> None:
    """Count what a fused prompt is made of as used last."""
    if runtime.library is not None:
        runtime.library.touch(segments_used(runtime.library, prompt, selector))


def _local_queries(
    runtime: Runtime,
    prompt: Prompt,
    kv_at: dict[int, ChunkKV],
    behind: dict[tuple[int, ...], ChunkKV | None],
    selector: SparseSelector,
) -> torch.Tensor:
    """The local queries of the prompt's chunks, ``(chunks, layers, heads, head_dim)``."""
    assert runtime.local_queries is not None
    assert runtime.library is not None
    chunks = [
        (start, segment, runtime.library.behind(segment))
        for start, segment in prompt.cached
        if segment.kind == "chunk"
    ]
    return torch.stack(
        [
            runtime.local_queries.get(selector, (ids, behind[ids]), segment.ids, kv_at[start])
            for start, segment, ids in chunks
        ]
    )


def answer(
    runtime: Runtime,
    prompt: Prompt,
    method: Method,
    sampling: Sampling,
    started: float,
    plan_s: float,
    emit: Callable[[str], None],
    abandoned: Callable[[], bool],
) -> FusionReport:
    """Answer a prompt that fits; ``started`` is when the request came, by ``perf_counter``.

    Planning the prompt took ``plan_s`` since then. Where the device's memory does not suffice,
    what it keeps for later requests is given up, and the request is tried once more.
    """
    emitted = False

    def emit_on(text: str) -> None:
        nonlocal emitted
        emitted = True
        emit(text)

    request = (runtime, prompt, method, sampling, started, plan_s, emit_on, abandoned)
    try:
        return _answer(*request)
    except torch.OutOfMemoryError as error:
        if emitted:
            raise
        logger.warning("%s. What is kept for later requests is given up for this one.", error)
    runtime.make_room()  # here, since the error keeps alive what the first try held
    return _answer(*request)


def _answer(
    runtime: Runtime,
    prompt: Prompt,
    method: Method,
    sampling: Sampling,
    started: float,
    plan_s: float,
    emit: Callable[[str], None],
    abandoned: Callable[[], bool],
) -> FusionReport:
    selector, room = method.selector, sampling.max_new_tokens
    report = FusionReport(
        model=runtime.name,
        selector=selector.name,
        ratio=selector.ratio,
        prompt_tokens=prompt.n_tokens,
        fallback_reason=why_prefill(runtime, prompt, method, room),
        plan_s=plan_s,
    )
    if report.fused and runtime.library is not None:
        report.stand_in = runtime.library.stand_in
    emitter = TextEmitter(runtime.tokenizer, emit, sampling.stop, sampling.shown)
    recorder = None if sampling.logprobs is None else RecordLogprobs(sampling.logprobs)
    # A cache that leaves tokens out serves its own request alone.
    keeps = (
        why_not_kept(runtime, prompt, room) is None
        and method.compression is None
        and not isinstance(selector, SparseSelector)
    )
    turn, reused = runtime.prefix_cache.find(prompt.ids, selector) if keeps else (None, 0)
    # Without a config no layer becomes a sliding one, which would drop tokens outside its window.
    cache: Cache | None = DynamicCache() if keeps else None
    try:
        if runtime.gate.rotation is not None:
            install(runtime.model)  # its owner may have chosen another attention since
        if report.fused or turn is not None:
            with one_request():
                cache = assemble(runtime, prompt, method, room, report, abandoned, turn, reused)
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
            runtime.decoder,
            recorder,
        )
        ended = time.perf_counter()
        if keeps and cache is not None:
            runtime.prefix_cache.put(prompt.ids + emitter.ids, prompt.n_tokens, selector, cache)
        if report.fused:
            touch(runtime, prompt, selector)
            if isinstance(cache, FusedCache) and runtime.library is not None:
                runtime.library.keep_resident(cache.on_device)
    except Abandoned:
        return replace(report, finish_reason="abandoned")
    report.fresh_tokens = prompt.n_tokens - report.cached_tokens - report.created_tokens
    report.generated_tokens = emitter.n_tokens
    report.logprobs = recorder.result(runtime.tokenizer, emitter.ids) if recorder else None
    first = emitter.first_token_at or ended
    report.ttft_s, report.decode_s = first - started, ended - first
    report.recompute_s = first - began
    report.trace = Trace(prompt, ())
    fusion = cache.fusion if isinstance(cache, FusedCache) else None
    if report.fused and isinstance(cache, FusedCache) and isinstance(fusion, FusionPass):
        report.select_s = fusion.select_seconds
        report.kv_bytes = cache.prompt_nbytes
        report.compression = method.compression.name if method.compression else ""
        # Some methods select inside the pass.
        report.recompute_s = first - max(began, fusion.selected_at)
        if fusion.selected is not None:
            left = fusion.pruning.survivors if fusion.pruning else {}
            kept_by_layer = {layer: tuple(at.tolist()) for layer, at in left.items()}
            selected = tuple(fusion.selected.tolist())
            report.trace = Trace(prompt, selected, kept_by_layer, fusion.local_global)
    report.recomputed_tokens = len(report.trace.recomputed)
    runtime.reports.append(report)
    return report
