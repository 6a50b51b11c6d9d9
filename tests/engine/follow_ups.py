"""Prompts that go on where another ended."""

from __future__ import annotations

import torch

from a3_engine import A3Engine
from a3_engine.method import Method
from a3_engine.model.cache_argument import with_cache
from a3_engine.report import FusionReport
from a3_engine.request import assemble
from a3_engine.segments import Prompt, Segment


def extended(engine: A3Engine, prompt: Prompt, more: list[Segment]) -> Prompt:
    """The prompt, the answer that was kept for it, and new segments."""
    (turn,) = (
        t for t in engine.runtime.prefix_cache._prefixes if list(t.ids[: t.n_prompt]) == prompt.ids
    )
    answer = Segment("fresh", turn.ids[turn.n_prompt :])
    segments = (*prompt.segments, answer, *more)
    return Prompt(segments, len(segments) - 1)


def follow_up_logits(engine: A3Engine, prompt: Prompt, selector, *, reuse: bool) -> torch.Tensor:
    turn, reused = engine.runtime.prefix_cache.find(prompt.ids, selector) if reuse else (None, 0)
    assert (reused > 0) == reuse
    cache = assemble(
        engine.runtime, prompt, Method(selector), 0, FusionReport(), prefix=turn, reused=reused
    ).cache
    with torch.inference_mode():
        ids = torch.tensor([prompt.ids])
        return engine.runtime.model(
            input_ids=ids, **with_cache(engine.runtime.model, cache)
        ).logits[0, -1]
