"""What a request decodes on: its chunks, fetched and laid into a cache, and the pass over them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from a3_engine.chunks.library import ChunkLibrary
from a3_engine.errors import UnsupportedModelError
from a3_engine.fusion.fusion_pass import Abandoned
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.prefix_cache import CachedPrefix
from a3_engine.fusion.selectors.base import Prepared, Run, Selector
from a3_engine.kv import ChunkKV
from a3_engine.method import Method
from a3_engine.report import ChunkUse, FusionReport
from a3_engine.runtime import Runtime
from a3_engine.segments import Prompt, Segment


def assemble(
    runtime: Runtime,
    prompt: Prompt,
    method: Method,
    room: int,
    report: FusionReport,
    abandoned: Callable[[], bool] = lambda: False,
    prefix: CachedPrefix | None = None,
    reused: int = 0,
) -> Prepared:
    """Lay a prompt's chunks into a cache, and prepare the pass that completes it.

    Parameters
    ----------
    room : int
        Slots for the answer.
    report : FusionReport
        Takes down what was fetched, and how long that took.
    prefix, reused
        An earlier request's cache, and how many of its tokens the prompt begins with.

    Raises
    ------
    UnsupportedModelError
        The gate refused the model.
    Abandoned
        Nobody waits for the request any more.
    """
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
    kv_at = _fetch(library, prompt, selector, used, reused, report, abandoned)
    contexts: dict[tuple[int, ...], ChunkKV | None] = {(): None}
    if selector.leaves_out:  # the thread that computes must not fetch
        contexts |= {one.ids: library.fetch(one, used).kv for one in _contexts(library, prompt)}
    local = partial(_local_queries, runtime, prompt, dict(kv_at), contexts)
    laid = [segment for start, segment in prompt.cached if start in kv_at]
    over: list[tuple[int, ChunkKV]] = []
    if head is not None and layout.chunks and (start := layout.chunks[0].start) in kv_at:
        fetched = library.fetch(head, used)
        report.encode_s += fetched.seconds
        over.append((start, fetched.kv))
        laid.append(head)
    compressor = method.compression.start() if method.compression else None

    def prepare() -> Prepared:
        cache = allocate(runtime.model, prompt.n_tokens, prompt.n_tokens + room)
        if compressor is not None and any(layer.shape.latent for layer in cache.layers):
            raise ValueError(
                "A compression keeps other tokens for each head, and the model keeps one latent "
                "for all heads. Choose none for this model."
            )
        brought = load_chunks(cache, rotation, list(kv_at.items()), over)
        cache.on_device = list(zip(laid, brought, strict=False))
        for start, kv in over:
            selector.follow_head(start, kv_at[start], kv, cache, rotation)
        if prefix is not None:
            prefix.copy_to(cache, reused)
        report.load_s = time.perf_counter() - started - report.encode_s
        observer = compressor.observe if compressor else None
        return selector.prepare(
            Run(
                runtime.model, rotation, cache, layout, prompt.ids, room, abandoned, observer, local
            )
        )

    prepared = runtime.executor.run(prepare)
    prepared.cache.compressor = compressor
    return prepared


def _fetch(
    library: ChunkLibrary,
    prompt: Prompt,
    selector: Selector,
    used: list[Segment],
    reused: int,
    report: FusionReport,
    abandoned: Callable[[], bool],
) -> dict[int, ChunkKV]:
    """The prompt's cached segments after its ``reused`` tokens, by their first positions."""
    report.reused_turn_tokens = report.cached_tokens = reused
    # A full prefill with compression runs as a fusion pass that needs no chunk.
    cached = prompt.cached if selector.uses_chunks else []
    for start, segment in cached:
        if segment.kind == "chunk" and not segment.owner and start + len(segment.ids) <= reused:
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
        if segment.kind == "chunk" and not segment.owner:
            report.chunks.append(
                ChunkUse(segment.text, len(segment.ids), fetched.hit, fetched.nbytes)
            )
        if fetched.hit:
            report.cached_tokens += len(segment.ids)
            report.history_tokens += len(segment.ids) * bool(segment.owner)
        else:
            report.created_tokens += len(segment.ids)
    return kv_at


def segments_used(library: ChunkLibrary, prompt: Prompt, selector: Selector) -> list[Segment]:
    """What a fused prompt is made of that lies in the store."""
    if not selector.uses_chunks:
        return []
    used = [segment for _, segment in prompt.cached]
    if (head := _head(library, prompt)) is not None:
        used.append(head)
    return used + _contexts(library, prompt) if selector.leaves_out else used


def _head(library: ChunkLibrary, prompt: Prompt) -> Segment | None:
    """The head of the first chunk, where that opens the prompt right after the encode prefix."""
    before: list[int] = []
    for segment in prompt.segments:
        if segment.kind == "chunk":
            return library.head(segment) if tuple(before) == library.prefix_ids else None
        before += segment.ids
    return None


def _contexts(library: ChunkLibrary, prompt: Prompt) -> list[Segment]:
    """What the prompt's chunks were computed after."""
    ids = {library.context_ids(segment): None for _, segment in prompt.cached}
    return [Segment("prefix", each) for each in ids if each]


def touch(runtime: Runtime, prompt: Prompt, selector: Selector) -> None:
    """Count what a fused prompt is made of as used last."""
    if runtime.library is not None:
        runtime.library.touch(segments_used(runtime.library, prompt, selector))


def _local_queries(
    runtime: Runtime,
    prompt: Prompt,
    kv_at: dict[int, ChunkKV],
    contexts: dict[tuple[int, ...], ChunkKV | None],
    n_local: int,
    layers: range,
) -> torch.Tensor:
    """The local queries of the prompt's chunks, ``(chunks, layers, heads, head_dim)``."""
    assert runtime.local_queries is not None
    assert runtime.library is not None
    queries = []
    for start, segment in prompt.cached:
        if segment.kind == "chunk":
            ids = runtime.library.context_ids(segment)
            context = ids, contexts[ids]
            queries.append(
                runtime.local_queries.get(n_local, layers, context, segment.ids, kv_at[start])
            )
    return torch.stack(queries)
