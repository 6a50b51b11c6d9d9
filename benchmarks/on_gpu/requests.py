"""Whole requests on Llama-3.1-8B's shape: first tokens, ingestion, decoding, memory."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import DynamicCache

from a3_engine import A3Engine
from a3_engine.chunks.store import StoreOptions
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.hooks import run_pass
from a3_engine.segments import Prompt

from .common import (
    CUDA,
    DEVICE,
    Bench,
    chunk,
    engine_of,
    fused_logits,
    now,
    off,
    plain_logits,
    prompt_of,
    random_model,
    timed,
)

METHODS = (("full_reuse", 0.0), ("mend", 0.05), ("mend", 0.15))


def start(bench: Bench) -> None:
    """How long an engine takes to start, and what the gate says."""
    started = now()
    engine = bench.llama()
    reason = engine.unsupported_reason
    bench.say("engine", model="Llama-3.1-8B", start_s=now() - started, reason=reason)


def _prefill_ms(engine: A3Engine, prompt: Prompt) -> float:
    """transformers' own full prefill to the first logits, without the engine."""
    model = engine.runtime.model
    ids = torch.tensor([prompt.ids], device=DEVICE)
    started = now()
    with torch.inference_mode():
        logits = model(input_ids=ids, **with_cache(model, DynamicCache()), logits_to_keep=1).logits
        int(logits[0, -1].argmax())
    return 1e3 * (now() - started)


def baseline(bench: Bench) -> None:
    """Full prefill with torch's attention: cuDNN makes a plan for each new length."""
    engine = bench.llama()
    for context in bench.contexts:
        chunks = bench.stored(engine, context // bench.chunk_tokens)
        rounds, found = (2 if context > 10_000 else 3), {}
        for cudnn in (True, False):
            if CUDA:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
            name = "cudnn" if cudnn else "flash"
            prompts = [prompt_of(engine, chunks, 40 + at) for at in range(rounds + 1)]
            taken = [(_prefill_ms(engine, p), _prefill_ms(engine, p)) for p in prompts][1:]
            found[f"{name}_new"] = statistics.median(new for new, _ in taken)
            found[f"{name}_seen"] = statistics.median(seen for _, seen in taken)
        if CUDA:
            torch.backends.cuda.enable_cudnn_sdp(True)
        bench.say("full prefill ms", context=context, **found)


def first_token(bench: Bench) -> None:
    """Every request has lengths and an order of chunks that nobody has seen; then once more."""
    _requests(bench, bench.llama(), "device")


def first_token_from_host(bench: Bench) -> None:
    """The same with the chunks in pinned memory of the host."""
    engine = engine_of(bench.llama().runtime.model, store=StoreOptions(memory_limit=2**34))
    assert engine.runtime.library is not None
    engine.runtime.library.resident.max_bytes = 0
    _requests(bench, engine, "pinned", bench.contexts[::2])
    engine.close()


def first_token_from_disk(bench: Bench) -> None:
    """The same with the chunks in files that the system has in memory."""
    engine = engine_of(bench.llama().runtime.model)
    assert engine.runtime.library is not None
    engine.runtime.library.resident.max_bytes = 0
    _requests(bench, engine, "files", bench.contexts[:1])
    engine.close()


def _requests(
    bench: Bench, engine: A3Engine, where: str, contexts: tuple[int, ...] | None = None
) -> None:
    question = 20
    for context in contexts or bench.contexts:
        chunks = bench.stored(engine, context // bench.chunk_tokens)
        for _ in range(2):
            engine.generate(prompt_of(engine, chunks, 99), selector="full_reuse", max_new_tokens=1)
        for method, ratio in METHODS:
            pairs: list[tuple[Any, Any]] = []
            peak = 0.0
            for turn in range(3 if context > 10_000 else 5):
                turned = chunks[turn:] + chunks[:turn]
                both = []
                for _ in range(2):
                    engine.runtime.prefix_cache.clear()
                    if CUDA:
                        torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated() if CUDA else 0
                    prompt = prompt_of(engine, turned, question + turn)
                    now()
                    both.append(
                        engine.generate(
                            prompt, selector=method, ratio=ratio, max_new_tokens=1
                        ).report
                    )
                    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
                pairs.append((both[0], both[1]))
            middle = sorted((new for new, _ in pairs[1:]), key=lambda r: r.ttft_s)[
                len(pairs) // 2 - 1
            ]
            bench.say(
                "TTFT ms",
                chunks=where,
                context=context,
                method=method,
                ratio=ratio,
                new=1e3 * statistics.median(new.ttft_s for new, _ in pairs[1:]),
                seen=1e3 * statistics.median(seen.ttft_s for _, seen in pairs[1:]),
                load=1e3 * middle.load_s,
                select=1e3 * middle.select_s,
                recompute=1e3 * middle.recompute_s,
                peak_MB=peak / 1e6,
            )
            question += 7


@torch.inference_mode()
def waits(bench: Bench) -> None:
    """How often the host waits for the device from the chunks' arrival to the first logits."""
    engine = bench.llama()
    chunks = bench.stored(engine, bench.contexts[0] // bench.chunk_tokens)
    for method, ratio in METHODS:
        prompt = prompt_of(engine, chunks, 61)
        engine.generate(prompt, selector=method, ratio=ratio, max_new_tokens=1)
        seen: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if CUDA:
                torch.cuda.set_sync_debug_mode("warn")
            _, cache = engine.prepare(prompt, selector=method, ratio=ratio)
            run_pass(engine.runtime.model.get_decoder(), [prompt.ids], cache)
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            seen = [
                f"{each.filename.rsplit('/', 1)[-1]}:{each.lineno}"
                for each in caught
                if "synchron" in str(each.message)
            ]
        bench.say(
            "waits", method=method, ratio=ratio, number=len(seen), where=sorted(set(seen))[:12]
        )


def launches(bench: Bench) -> None:
    """Launches and copies of one request, and how long the device works on it."""
    if not CUDA:
        return
    from torch.profiler import ProfilerActivity, profile

    engine = bench.llama()
    chunks = bench.stored(engine, bench.contexts[0] // bench.chunk_tokens)
    for method, ratio in METHODS:
        prompt = prompt_of(engine, chunks, 150)
        engine.generate(prompt, selector=method, ratio=ratio, max_new_tokens=1)
        engine.runtime.prefix_cache.clear()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            engine.generate(prompt, selector=method, ratio=ratio, max_new_tokens=1)
            now()
        events = seen.key_averages()
        by = {event.key: event for event in events}
        names = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cuLaunchKernel",
                 "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaMalloc")  # fmt: skip
        top = sorted(
            (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA),
            key=lambda e: -e.self_device_time_total,
        )[:8]
        bench.say(
            "launches",
            method=method,
            ratio=ratio,
            busy_ms=sum(
                e.self_device_time_total
                for e in events
                if e.device_type == torch.autograd.DeviceType.CUDA
            )
            / 1e3,
            top=[f"{e.key[:40]} x{e.count} {e.self_device_time_total:.0f}us" for e in top],
            **{name: by[name].count for name in names if name in by},
        )
        seen.export_chrome_trace(str(bench.out / f"trace_{method}_{ratio}.json.gz"))


def ingestion(bench: Bench) -> None:
    """Tokens a second into the store, beside a plain forward of as many."""
    engine = bench.llama()
    model, tokens = engine.runtime.model, bench.chunk_tokens
    ids = torch.randint(4, model.config.vocab_size, (8, tokens), device=DEVICE)
    with torch.inference_mode():
        plain = 8e3 * tokens / timed(lambda: model.model(input_ids=ids), 3)
    fresh = engine_of(model)
    library = fresh.runtime.library
    assert library is not None
    chunks = [
        chunk(10**5 + at, model.config.vocab_size, tokens) for at in range(8 if bench.tiny else 48)
    ]
    list(library.store_all(chunks[:8]))
    started = now()
    list(library.store_all(chunks[8:] or chunks))
    rate = len(chunks[8:] or chunks) * tokens / (now() - started)
    bench.say("ingestion", plain_tokens_s=plain, tokens_s=rate, share=rate / plain)
    fresh.close()


@torch.inference_mode()
def decoding(bench: Bench) -> None:
    """A step of one and of eight requests, beside transformers' `generate` with each attention."""
    engine = bench.llama()
    model = engine.runtime.model
    chunks = bench.stored(engine, bench.contexts[0] // bench.chunk_tokens)
    prompt = prompt_of(engine, chunks, 33)
    inputs = torch.tensor([prompt.ids], device=DEVICE)
    for cudnn in (True, False):
        if CUDA:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        taken = {}
        for tokens in (1, 17):
            started = now()
            model.generate(
                inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            taken[tokens] = now() - started
        bench.say("generate", cudnn=cudnn, ms=1e3 * (taken[17] - taken[1]) / 16)
    if CUDA:
        torch.backends.cuda.enable_cudnn_sdp(True)
    for number in (1, 8):

        def ask(at: int) -> Any:
            return engine.generate(
                prompt_of(engine, chunks[at:] + chunks[:at], 33 + at),
                selector="full_reuse",
                max_new_tokens=4 if bench.tiny else 64,
            ).report

        for _ in range(2):  # the first captures what it needs
            engine.runtime.prefix_cache.clear()
            with ThreadPoolExecutor(number) as pool:
                started = time.perf_counter()
                reports = list(pool.map(ask, range(number)))
                took = time.perf_counter() - started
        ms = statistics.median(1e3 * r.decode_s / max(1, r.generated_tokens - 1) for r in reports)
        total = sum(r.generated_tokens for r in reports)
        bench.say("decoding", requests=number, ms_a_step=ms, tokens_s=total / took, whole_s=took)


def exhausted(bench: Bench) -> None:
    """A request that does not fit fails alone, memory comes back, and the next one is answered."""
    if not CUDA:
        return
    engine = bench.llama()
    chunks = bench.stored(engine, bench.contexts[0] // bench.chunk_tokens)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_allocated()
    for spare in (1.2e9, 1e8):
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + spare) / total))
        try:
            engine.generate(prompt_of(engine, chunks, 60), selector="mend", max_new_tokens=1)
            outcome = "answered"
        except torch.OutOfMemoryError:
            outcome = "OutOfMemoryError"
        bench.say("out of memory", spare_MB=spare / 1e6, outcome=outcome)
    torch.cuda.set_per_process_memory_fraction(1.0)
    engine.generate(prompt_of(engine, chunks, 61), selector="mend", max_new_tokens=1)
    bench.say("out of memory", outcome="the next is answered",
              held_MB=(torch.cuda.memory_allocated() - held) / 1e6)  # fmt: skip


def qwen(bench: Bench) -> None:
    """A model with norms before rotation: how far bf16 lies off at ratio 1.0."""
    engine = engine_of(random_model(bench.config("Qwen3-8B")))
    reason = engine.unsupported_reason
    if reason is None:
        prompt = prompt_of(engine, bench.stored(engine, 4), 24)
        full = plain_logits(engine, prompt)
        bench.say(
            "Qwen3-8B", reason=reason, one=off(fused_logits(engine, prompt, "mend", 1.0), full)
        )
    else:
        bench.say("Qwen3-8B", reason=reason)
    engine.close()
