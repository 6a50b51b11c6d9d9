"""What selectors pick: A3 against a second implementation of its description, and laws for all."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from a3_engine import A3Engine, Prompt
from a3_engine.fusion.fusion_pass import States
from a3_engine.fusion.selectors import SELECTORS, make_selector
from a3_engine.fusion.selectors.a3 import A3
from a3_engine.layout import Layout, Span
from a3_engine.model.cache_argument import OURS, with_cache
from a3_engine.segments import Segment
from tests.engine.turning import PARAGRAPHS, QUESTION, turned
from tests.tiny import VOCABULARY


def run(engine: A3Engine, prompt: Prompt, selector: object, ratio: float):
    """One fusion pass: its logits, and the completed cache."""
    _, cache = engine.prepare(prompt, selector=selector, ratio=ratio)
    with torch.inference_mode():
        output = engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, cache)
        )
    return output.logits[0], cache


def picks(cache) -> list[int]:
    """The recomputed positions, which are the same at every layer."""
    return cache.fusion.selected.tolist()


def full_prefill(engine: A3Engine, prompt: Prompt):
    with torch.inference_mode():
        return engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, DynamicCache())
        )


def naive_a3_scores(model, ids: list[int], p: int, q: int) -> list[float]:
    """Steps 1 to 7 of the method's description: pooled scores of the tokens after the prefix."""
    config, layer = model.config, model.model.layers[1]
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, n = config.rope_parameters["rope_theta"], len(ids)
    with torch.inference_mode():
        entering = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        normed = layer.input_layernorm(entering)
        queries = layer.self_attn.q_proj(normed).view(n, heads, size).double()
        keys = layer.self_attn.k_proj(normed).view(n, groups, size).double()
    key = {
        j: torch.stack([turned(keys[j, g], j, theta) for g in range(groups)]) for j in range(p, n)
    }
    scores = [0.0] * (n - p - q)
    for i in range(n - q, n):
        query = torch.stack([turned(queries[i, h], i, theta) for h in range(heads)])
        logits = []
        for j in range(p, n):
            if j > i:
                logits.append(-math.inf)
                continue
            repeated = key[j].repeat_interleave(heads // groups, dim=0)
            logits.append(float((query * repeated).sum()) / math.sqrt(heads * size))
        top = max(logits)
        weights = [math.exp(value - top) for value in logits]
        for j in range(n - p - q):
            scores[j] += weights[j] / sum(weights)
    padded = [0.0, 0.0, *scores, 0.0, 0.0]
    return [sum(padded[j : j + 5]) / 5 for j in range(len(scores))]


@pytest.fixture(scope="module")
def real_case(demo_engine):
    """A real prompt of five chunks, its layout, and the naive scores of its tokens."""
    prompt = demo_engine.plan(QUESTION, PARAGRAPHS)
    spans, at = [], 0
    for segment in prompt.segments:
        if segment.kind == "chunk":
            spans.append((at, at + len(segment.ids)))
        at += len(segment.ids)
    assert len(spans) == 5
    p, q = spans[0][0], prompt.n_tokens - spans[-1][1]
    return prompt, spans, q, naive_a3_scores(demo_engine.runtime.model, prompt.ids, p, q)


@pytest.mark.real_model
@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.5])
def test_a3_picks_what_its_description_picks(demo_engine, real_case, ratio):
    """Steps 8 and 9: the best of the chunks' tokens; the budget counts the prefix too."""
    prompt, spans, q, scores = real_case
    p = spans[0][0]
    candidates = [j for start, stop in spans for j in range(start, stop)]
    budget = int((prompt.n_tokens - q) * ratio)
    expected = sorted(sorted(candidates, key=lambda j: -scores[j - p])[:budget])
    _, cache = run(demo_engine, prompt, "a3", ratio)
    assert picks(cache) == expected


@pytest.mark.real_model
def test_error_shrinks_as_the_ratio_grows(demo_engine, real_case):
    """Divergence of the question's next-token distributions from those of a full prefill."""
    prompt, _, q, _ = real_case
    expected = full_prefill(demo_engine, prompt).logits[0, -q:].log_softmax(-1)
    errors = []
    for ratio in (0.0, 0.15, 0.5, 1.0):
        ours = run(demo_engine, prompt, "a3", ratio)[0][-q:].log_softmax(-1)
        errors.append(float((expected.exp() * (expected - ours)).sum(-1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01  # full reuse is not a full prefill
    assert errors[2] < errors[0]
    assert abs(errors[3]) < 1e-6
    reused = run(demo_engine, prompt, "full_reuse", 0.0)[0][-q:].log_softmax(-1)
    torch.testing.assert_close(
        float((expected.exp() * (expected - reused)).sum(-1).mean()), errors[0]
    )


LAYOUTS = {
    "one chunk": ["p", 20, "f"],
    "twice the same": ["p", 15, "f", "again", "f"],
    "neighbours": ["p", 7, 9, 5, "f"],
    "one-token chunks": ["p", 1, "f", 1, 1, "f"],
    "many chunks": ["p", *[5, "f"] * 25],
    "fresh ahead": ["f", "f", 12, "f", 9, "f"],
    "no prefix": [11, 4, "f"],
}


def build(engine: A3Engine, shape: list[str | int]) -> Prompt:
    generator = torch.Generator().manual_seed(2)
    segments: list[Segment] = []
    for part in shape:
        if part == "p":
            segments.append(Segment("prefix", engine.runtime.planner.prefix_ids))
        elif part == "again":
            segments.append(next(s for s in segments if s.kind == "chunk"))
        else:
            n = 4 if part == "f" else int(part)
            ids = torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()
            segments.append(Segment("fresh" if part == "f" else "chunk", tuple(ids)))
    return Prompt(tuple(segments), len(segments) - 1)


@pytest.mark.parametrize("ratio", [0.001, 0.15, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("shape", LAYOUTS)
def test_picks_are_chunk_tokens_within_the_budget(tiny_engine, shape, ratio):
    """Sorted, each once, chunk tokens only, exactly as many as the budget; all of them at 1."""
    engine = tiny_engine()
    prompt = build(engine, LAYOUTS[shape])
    candidates, at = [], 0
    for segment in prompt.segments:
        if segment.kind == "chunk":
            candidates += range(at, at + len(segment.ids))
        at += len(segment.ids)
    n_question = len(prompt.segments[-1].ids)
    budget = min(int((prompt.n_tokens - n_question) * ratio), len(candidates))
    selected = picks(run(engine, prompt, "a3", ratio)[1])
    assert selected == sorted(set(selected))
    assert set(selected) <= set(candidates)
    assert len(selected) == (len(candidates) if ratio == 1.0 else budget)
    assert ratio > 0.001 or selected == []


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mistral"])
def test_cache_is_exact_up_to_the_selecting_layer(tiny_engine, architecture, layer):
    """The dense layers, and the states that were compared, are those of a full prefill."""
    engine = tiny_engine(architecture)
    prompt = build(engine, ["p", 20, "f", 20, "f"])
    expected = getattr(full_prefill(engine, prompt), OURS)
    _, cache = run(engine, prompt, A3(layer=layer), 0.2)
    for index in range(layer + 1):
        ours, theirs = cache.layers[index], expected.layers[index]
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    last = cache.layers[-1].values - expected.layers[-1].values
    assert last.abs().max() > 1e-2  # what is reused is not


def test_a_question_ahead_of_its_documents_selects_too():
    """Documents from a tool follow the user's words: the tokens that those attend to are picked."""
    layout = Layout(
        n_tokens=40,
        chunks=(Span(8, 36),),
        prefix_tokens=8,
        fresh=torch.tensor([*range(8), *range(36, 40)]),
        question=torch.tensor([*range(2, 8), *range(36, 40)]),
    )
    query, key = torch.zeros(1, 2, 40, 4), torch.zeros(1, 1, 40, 4)
    query[:, :, 2:8, 0] = 3.0
    key[:, :, [12, 25, 30], 0] = 30.0
    picked = A3(ratio=0.1, pool=1).select(layout, States(query, key, key), States(None, key, key))
    assert sorted(picked.tolist()) == [12, 25, 30]


def test_without_chunks_there_is_nothing_to_pick(tiny_engine):
    """A prompt that holds no chunk may be fused all the same, and is a full prefill."""
    engine = tiny_engine()
    prompt = build(engine, ["p", "f", "f"])
    expected = full_prefill(engine, prompt).logits[0, -1]
    logits, cache = run(engine, prompt, "a3", 0.5)
    assert picks(cache) == []
    torch.testing.assert_close(logits[-1], expected, atol=1e-4, rtol=0)


def test_unknown_selectors_are_refused_with_the_choices(tiny_engine):
    with pytest.raises(ValueError, match=r"cacheblend.*choose") as refusal:
        make_selector("cacheblend-2")
    assert all(name in str(refusal.value) for name in SELECTORS)
    with pytest.raises(ValueError, match="nonsense"):
        tiny_engine().generate("Who keeps the lamp?", selector="nonsense")


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_ratios_outside_0_to_1_are_refused(tiny_engine, name, ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        tiny_engine(selector=name, ratio=ratio)
    with pytest.raises(ValueError, match=str(ratio)):
        make_selector(name, ratio)


def test_settings_that_make_no_sense_are_refused(tiny_engine):
    """A layer that the model does not have, or a pooling width without a middle."""
    engine = tiny_engine()
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layers 0 to 3"):
            engine.prepare("Who?", chunks=["The lamp burns."], selector=A3(layer=layer))
    for pool in (0, 4):
        with pytest.raises(ValueError, match="odd"):
            A3(pool=pool)
