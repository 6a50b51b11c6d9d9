"""The invariants, for every architecture: what is recomputed is exact, what is reused is reuse."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from a3_engine.fusion.selectors import SELECTORS
from a3_engine.model.cache_argument import OURS
from tests.engine.prompts import (
    SHAPES,
    build_prompt,
    full_prefill,
    fused_logits,
    independent_full_reuse,
)
from tests.tiny import CONFIGS

pytestmark = pytest.mark.parametrize("architecture", CONFIGS)

# Every shape with the default, and every other method with the shape that has all roles.
CASES = [("mend", shape) for shape in SHAPES] + [
    (selector, "fresh between") for selector in sorted(set(SELECTORS) - {"full_prefill", "mend"})
]


@pytest.mark.parametrize(("selector", "shape"), CASES)
def test_ratio_one_is_full_prefill(tiny_engine, architecture, shape, selector):
    """Recomputing every token gives the logits of an ordinary prefill of the same ids."""
    engine = tiny_engine(architecture)
    assert engine.unsupported_reason is None
    prompt = build_prompt(engine, SHAPES[shape])
    expected = full_prefill(engine, prompt).logits[0, -1]
    torch.testing.assert_close(
        fused_logits(engine, prompt, selector, 1.0), expected, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(("selector", "shape"), CASES)
def test_ratio_zero_is_full_reuse(tiny_engine, architecture, shape, selector):
    """Chunks computed where they will stand, by position ids alone, and fresh text after them."""
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, SHAPES[shape])
    expected = independent_full_reuse(engine, engine.runtime.model, prompt).logits[0, -1]
    torch.testing.assert_close(
        fused_logits(engine, prompt, selector, 0.0), expected, atol=1e-3, rtol=0
    )


def test_first_chunk_behind_its_prefix_is_exact(tiny_engine, architecture):
    """Stored, rotated back, loaded and rotated again, its cache is that of a full prefill."""
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, ["prefix", 20, "fresh"])
    expected = getattr(full_prefill(engine, prompt), OURS)
    stop = prompt.n_tokens - 5
    for attempt in ("computed", "loaded"):
        _, cache = engine.prepare(prompt, selector="full_reuse")
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            if isinstance(theirs, LinearAttentionLayer):
                continue
            keys, values = ours.stored()
            scale = theirs.keys.abs().max()
            torch.testing.assert_close(
                keys[:, :, :stop] / scale, theirs.keys[:, :, :stop] / scale, atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                values[:, :, :stop], theirs.values[:, :, :stop], atol=1e-4, rtol=1e-4, msg=attempt
            )
    assert prompt.layout(engine.runtime.planner.prefix_ids).chunks[0].exact == 20


def test_decoding_goes_on_as_after_a_prefill(tiny_engine, architecture):
    """The completed cache is an ordinary one: at ratio 1.0 the whole greedy answer is the same."""
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, ["prefix", 9, "fresh", 14, "fresh"])
    fused = engine.generate(prompt, selector="a3", ratio=1.0, max_new_tokens=24)
    plain = engine.generate(prompt, selector="full_prefill", max_new_tokens=24)
    assert fused.report.fused
    assert not plain.report.fused
    assert fused.text == plain.text
    assert fused.report.generated_tokens == plain.report.generated_tokens
