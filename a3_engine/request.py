"""One request: assemble its cache, decode, and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache

from a3_engine.assembly import assemble, touch
from a3_engine.chunks.patience import one_request
from a3_engine.decoding.generate import decode
from a3_engine.decoding.logprobs import RecordLogprobs
from a3_engine.decoding.sampling import Sampling
from a3_engine.decoding.text_emitter import TextEmitter
from a3_engine.errors import ContextOverflowError
from a3_engine.fusion.fusion_pass import Abandoned
from a3_engine.fusion.selectors.base import Prepared
from a3_engine.method import Method
from a3_engine.model.attention import install
from a3_engine.model.kv_shape import ordinary_cache
from a3_engine.report import FusionReport, Trace
from a3_engine.runtime import Runtime
from a3_engine.segments import Prompt

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
    if not method.selector.uses_chunks and method.compression is None:
        return "full_prefill was asked for"
    if (reason := why_not_kept(runtime, prompt, room)) is not None:
        return reason
    has_chunks = any(segment.kind == "chunk" for segment in prompt.segments)
    if not has_chunks and method.compression is None:
        return "the prompt holds no known chunk"
    return None


@dataclass(frozen=True)
class Request:
    """A prompt that fits, and how it is answered.

    ``started`` is when the request came, by ``perf_counter``; planning took ``plan_s`` since then.
    """

    runtime: Runtime
    prompt: Prompt
    method: Method
    sampling: Sampling
    started: float
    plan_s: float

    def answer(self, emit: Callable[[str], None], abandoned: Callable[[], bool]) -> FusionReport:
        """Answer piece by piece.

        Where the device's memory does not suffice, what it keeps for later requests is given up,
        and the request is tried once more.
        """
        said: list[str] = []
        with ExitStack() as unanswered:
            if self.runtime.turns is not None:
                unanswered.enter_context(self.runtime.turns.until_first_token())

            def emit_on(text: str) -> None:
                unanswered.close()
                said.append(text)
                emit(text)

            try:
                report = self._attempt(emit_on, abandoned)
            except torch.OutOfMemoryError as error:
                if said:
                    raise
                logger.warning(
                    "%s. What is kept for later requests is given up for this one.", error
                )
                report = None
            if report is None:  # here, since the error keeps alive what the first try held
                self.runtime.make_room()
                report = self._attempt(emit_on, abandoned)
        self._keep_turns(report, "".join(said))
        return report

    def _attempt(self, emit: Callable[[str], None], abandoned: Callable[[], bool]) -> FusionReport:
        runtime, prompt, sampling = self.runtime, self.prompt, self.sampling
        selector, room = self.method.selector, sampling.max_new_tokens
        report = self._new_report()
        emitter = TextEmitter(runtime.tokenizer, emit, sampling.stop, sampling.shown)
        recorder = None if sampling.logprobs is None else RecordLogprobs(sampling.logprobs)
        prefix, reused = None, 0
        if self._serves_later:
            prefix, reused = runtime.prefix_cache.find(prompt.ids, selector)
        prepared: Prepared | None = None
        cache: Cache | None = None
        if self._serves_later:
            cache = ordinary_cache(runtime.model.get_decoder())
        try:
            if runtime.gate.rotation is not None:
                install(runtime.model)  # its owner may have chosen another attention since
            if report.fused or prefix is not None:
                with one_request():
                    prepared = assemble(
                        runtime, prompt, self.method, room, report, abandoned, prefix, reused
                    )
                cache = prepared.cache
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
            if self._serves_later and cache is not None:
                ids = prompt.ids + emitter.ids
                runtime.prefix_cache.put(ids, prompt.n_tokens, selector, cache)
            if report.fused:
                touch(runtime, prompt, selector)
                if prepared is not None and runtime.library is not None:
                    runtime.library.keep_resident(prepared.cache.on_device)
        except Abandoned:  # from the middle of a forward, or from above
            return replace(report, finish_reason="abandoned")
        first = emitter.first_token_at or ended
        report.fresh_tokens = prompt.n_tokens - report.cached_tokens - report.created_tokens
        report.generated_tokens = emitter.n_tokens
        report.logprobs = recorder.result(runtime.tokenizer, emitter.ids) if recorder else None
        report.ttft_s, report.decode_s = first - self.started, ended - first
        report.recompute_s = first - began
        report.trace = Trace(prompt, ())
        if report.fused and prepared is not None:
            self._report_pass(report, prepared, began, first)
        report.recomputed_tokens = len(report.trace.recomputed)
        runtime.reports.append(report)
        return report

    def _keep_turns(self, report: FusionReport, answer: str) -> None:
        """Let the conversation's turns be stored; an answer that may be a call is none yet."""
        runtime, prompt, sampling = self.runtime, self.prompt, self.sampling
        if (
            runtime.turns is None
            or report.finish_reason == "abandoned"
            or not self.method.selector.uses_chunks
            or why_not_kept(runtime, prompt, sampling.max_new_tokens) is not None
        ):
            return
        called = sampling.grammar or any(mark in answer for mark in sampling.shown)
        runtime.turns.keep(prompt.turns if called else runtime.planner.answered(prompt, answer))

    @property
    def _serves_later(self) -> bool:
        """Whether later prompts may go on with this request's cache, which leaves nothing out."""
        return (
            self.method.compression is None
            and not self.method.selector.leaves_out
            and why_not_kept(self.runtime, self.prompt, self.sampling.max_new_tokens) is None
        )

    def _new_report(self) -> FusionReport:
        runtime, prompt, method = self.runtime, self.prompt, self.method
        report = FusionReport(
            model=runtime.name,
            selector=method.selector.name,
            ratio=method.selector.ratio,
            prompt_tokens=prompt.n_tokens,
            fallback_reason=why_prefill(runtime, prompt, method, self.sampling.max_new_tokens),
            plan_s=self.plan_s,
            conversation=prompt.conversation.tag if prompt.conversation else "",
        )
        if report.fused and runtime.library is not None:
            report.stand_in = runtime.library.stand_in
        return report

    def _report_pass(
        self, report: FusionReport, prepared: Prepared, began: float, first: float
    ) -> None:
        """What the pass selected, and its parts of the time from ``began`` to the first token."""
        cache, fusion = prepared
        report.select_s = fusion.select_seconds
        report.kv_bytes = cache.prompt_nbytes
        report.compression = self.method.compression.name if self.method.compression else ""
        # Some methods select inside the pass.
        report.recompute_s = first - max(began, fusion.selected_at)
        if fusion.selected is not None:
            survivors = fusion.pruning.survivors if fusion.pruning else {}
            kept_by_layer = {layer: tuple(at.tolist()) for layer, at in survivors.items()}
            selected = tuple(fusion.selected.tolist())
            report.trace = Trace(self.prompt, selected, kept_by_layer, fusion.local_global)
