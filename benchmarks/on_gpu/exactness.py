"""The invariants on the device: fourteen tiny architectures in two dtypes, beside the CPU."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.tiny import CONFIGS, tiny_model

from .common import DEVICE, Bench, chunk, engine_of, fused_logits, off, plain_logits, prompt_of

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 8e-2}


def exactness(bench: Bench) -> None:
    """Ratio 1.0, ratio 0.0, `mend` and decoding, on the device beside the CPU."""
    names = list(CONFIGS)[:3] if bench.tiny else list(CONFIGS)
    for dtype, bound in BOUNDS.items():
        bad: list[str] = []
        worst: dict[str, float] = {}
        begun = time.perf_counter()
        for name in names:
            if time.perf_counter() - begun > 60:
                bad.append(f"no time from {name} on")
                break
            # Made in fp32: some versions of torch draw other weights in other dtypes.
            engine = engine_of(tiny_model(name).to(DEVICE, dtype))
            on_cpu = engine_of(tiny_model(name).to(dtype))
            if (reason := engine.unsupported_reason) is not None:
                bad.append(f"{name}: {reason}")
                continue
            prompt = prompt_of(engine, [chunk(1, 320, 19), chunk(2, 320, 14)], 7)
            full = plain_logits(engine, prompt)
            mend = fused_logits(engine, prompt, "mend", 0.4)
            found = {
                "one": max(off(fused_logits(engine, prompt, s, 1.0), full) for s in ("mend", "a3")),
                "full_to_cpu": off(full, plain_logits(on_cpu, prompt)),
                "zero_to_cpu": off(
                    fused_logits(engine, prompt, "full_reuse", 0.0),
                    fused_logits(on_cpu, prompt, "full_reuse", 0.0),
                ),
            }
            if dtype == torch.float32:  # in bf16 rounding picks other tokens
                found["mend_to_cpu"] = off(mend, fused_logits(on_cpu, prompt, "mend", 0.4))
            fast, plain = (
                engine.generate(
                    prompt, selector=s, ratio=1.0, max_new_tokens=12, logprobs=0
                ).report.logprobs
                for s in ("a3", "full_prefill")
            )
            found["decoding"] = max(
                abs(x.logprob - y.logprob) for x, y in zip(fast, plain, strict=True)
            )
            if not bool(mend.isfinite().all()):
                bad.append(f"{name}: mend gives no finite logits")
            for key, value in found.items():
                worst[key] = max(worst.get(key, 0.0), value)
                if not value <= bound * (10 if key == "decoding" else 1):
                    bad.append(f"{name} {key} {value:.2g}")
            engine.close()
            on_cpu.close()
        bench.say("exactness", dtype=str(dtype), models=len(names), bad=bad, **worst)


def together(bench: Bench) -> None:
    """Two engines and eight threads on one device answer as one after the other do."""
    engines = [engine_of(tiny_model(name).to(DEVICE)) for name in ("llama", "qwen3")]
    prompts = [
        prompt_of(engine, [chunk(at, 320, 19), chunk(at + 1, 320, 14)], 7 + at)
        for at in range(4)
        for engine in engines
    ]

    def ask(at: int) -> str:
        return str(engines[at % 2].generate(prompts[at], max_new_tokens=16))

    alone = [ask(at) for at in range(8)]
    for engine in engines:
        engine.runtime.prefix_cache.clear()
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(ask, range(8)))
    bench.say(
        "two engines, eight threads", equal=sum(a == b for a, b in zip(alone, crowd, strict=True))
    )
    for engine in engines:
        engine.close()
