"""Selectors against naive second implementations: loops, and transformers' eager attention."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

import a3_engine.chunks.library as library_module
from a3_engine import A3Engine
from a3_engine.fusion.cache import FusedCache, FusedLayer
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.fusion.fusion_pass import States
from a3_engine.fusion.loading import load_chunks
from a3_engine.fusion.selectors import make_selector
from a3_engine.fusion.selectors.cacheblend import CacheBlend
from a3_engine.fusion.selectors.epic import Epic
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout, Span
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.rotary import Rotation
from tests.engine.prompts import build_prompt, independent_full_reuse
from tests.tiny import CONFIGS, tiny_model

SHAPE = ["prefix", "fresh", 9, "fresh", 14, "fresh"]


def eager_question_attention(engine: A3Engine, name: str, prompt) -> torch.Tensor:
    """Full reuse, segment by segment, with transformers' own caches and eager attention.

    Averaged over the heads, ``(layers, question, tokens)``.
    """
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    output = independent_full_reuse(engine, model, prompt, output_attentions=True)
    return torch.stack([layer[0].mean(dim=0) for layer in output.attentions])


# Softcapped scores are left out of the scoring, and windows too: it ranks, it does not compute.
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2", "qwen3", "phi3", "smollm3"])
def test_question_attention_is_the_models_own(tiny_engine, name):
    """Scores over the loaded cache are the eager attention weights, and their top is selected."""
    engine = tiny_engine(name)
    prompt = build_prompt(engine, SHAPE)
    expected = eager_question_attention(engine, name, prompt).mean(1)
    seen = []
    selector = make_selector("question_attention", 0.4)

    class Spy(type(selector)):
        def select(self, layout, attention):
            seen.append(attention)
            return super().select(layout, attention)

    _, cache = engine.prepare(prompt, selector=Spy(ratio=0.4))
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-3)
    candidates = prompt.layout(()).chunk_positions
    ranked = sorted(candidates.tolist(), key=lambda p: -float(expected.mean(0)[p]))
    assert cache.fusion.selected.tolist() == sorted(ranked[: int(0.4 * len(candidates))])


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2", "qwen3", "phi3", "smollm3"])
def test_mend_takes_what_any_word_of_the_question_attends_to(tiny_engine, name):
    """The most that a token of it does, over the lower layers; a chunk's start counts more."""
    engine = tiny_engine(name)
    prompt = build_prompt(engine, SHAPE)
    by_token = eager_question_attention(engine, name, prompt)
    scores = by_token[: -(-len(by_token) // 3)].amax(1).mean(0)
    for span in prompt.layout(()).chunks:
        for after, position in enumerate(range(span.start, span.stop)):
            scores[position] *= 1 + 2 * math.exp(-after / 8)
    _, cache = engine.prepare(prompt, selector="mend", ratio=0.4)
    candidates = prompt.layout(()).chunk_positions.tolist()
    ranked = sorted(candidates, key=lambda position: -float(scores[position]))
    assert cache.fusion.selected.tolist() == sorted(ranked[: int(0.4 * len(candidates))])


def test_cacheblend_takes_what_changed_most():
    layout = Layout(
        10, (Span(1, 4), Span(4, 8)), 1, torch.tensor([0, 8, 9]), question=torch.tensor([8, 9])
    )
    torch.manual_seed(0)
    fresh, stored = torch.randn(2, 1, 2, 10, 4)
    changes = {}
    for position in range(1, 8):
        changes[position] = sum(
            float(fresh[0, head, position, i] - stored[0, head, position, i]) ** 2
            for head in range(2)
            for i in range(4)
        )
    expected = sorted(changes, key=lambda p: -changes[p])[: int((10 - 2) * 0.5)]
    picked = CacheBlend(ratio=0.5).select(
        layout, States(None, stored, fresh), States(None, stored, stored)
    )
    assert sorted(picked.tolist()) == sorted(expected)


def test_epic_takes_the_first_tokens_of_every_chunk_but_the_first():
    layout = Layout(
        30,
        (Span(2, 10), Span(10, 13), Span(14, 28)),
        2,
        torch.tensor([0, 1, 13, 28, 29]),
        question=torch.tensor([28, 29]),
    )
    assert Epic(first=4).select(layout).tolist() == [10, 11, 12, 14, 15, 16, 17]
    assert len(Epic(ratio=0.25).select(layout)) <= 0.25 * 25


def test_random_is_the_same_for_the_same_seed(tiny_engine):
    engine = tiny_engine()
    prompt = build_prompt(engine, SHAPE)
    picks = [
        engine.prepare(prompt, selector=make_selector("random", 0.5))[1].fusion.selected.tolist()
        for _ in range(2)
    ]
    assert picks[0] == picks[1]


@pytest.mark.parametrize("size", [4, 32], ids=["torch", "loops where there are"])
@pytest.mark.parametrize("strength", [0.0, 0.7, 1])
def test_drift_follows_the_most_similar_probes(strength, size):
    """Token by token, head by head, with rotations as complex numbers."""
    torch.manual_seed(0)
    heads, tokens, temperature, half = 2, 9, 0.3, size // 2
    inv_freq = torch.logspace(0, -1, half)[None]
    keys, values = torch.randn(2, 1, heads, tokens, size)
    layer = FusedLayer(keys.clone(), values.clone(), tokens)
    layout = Layout(
        tokens, (Span(0, 2, exact=2), Span(2, 8)), 0, torch.tensor([8]), torch.tensor([8])
    )
    rows = torch.tensor([0, 3, 5, 8])
    fresh_key, fresh_value = torch.randn(2, 1, heads, len(rows), size)
    drift = Corrector(
        KVCorrection(strength, temperature), layout, Rotation(inv_freq), [keys.device]
    )
    drift.apply(0, layer, rows, fresh_key, fresh_value)
    layer.write(rows, fresh_key, fresh_value)

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = [complex(vector[i], vector[i + half]) for i in range(half)]
        spun = [
            pair * cmath.exp(1j * position * float(frequency))
            for pair, frequency in zip(pairs, inv_freq[0], strict=True)
        ]
        return torch.tensor([s.real for s in spun] + [s.imag for s in spun])

    probes, others = {3: 1, 5: 2}, [2, 4, 6, 7]
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, rows], expected_values[:, :, rows] = fresh_key, fresh_value
    for other in others:
        mine = values[0, :, other].flatten()
        similarity = {
            probe: float(torch.cosine_similarity(mine, values[0, :, probe].flatten(), dim=0))
            for probe in probes
        }
        total = sum(cmath.exp(s / temperature).real for s in similarity.values())
        for probe, row in probes.items():
            weight = cmath.exp(similarity[probe] / temperature).real / total
            for head in range(heads):
                move = turned(fresh_key[0, head, row] - keys[0, head, probe], -probe)
                expected_keys[0, head, other] += strength * weight * turned(move, other)
                expected_values[0, head, other] += (
                    strength * weight * (fresh_value[0, head, row] - values[0, head, probe])
                )
    ours = layer.stored()
    torch.testing.assert_close(ours[0], expected_keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1], expected_values, atol=1e-5, rtol=1e-4)


def test_the_rest_of_a_first_chunk_follows_its_head():
    """Token by token: a mean of the head's moves, by the similarity of values after the stand-in.

    Keys are stored without position, so that no move is turned.
    """
    torch.manual_seed(0)
    layers, heads, tokens, size, n_head, temperature = 2, 2, 9, 4, 3, 0.3
    chunk = ChunkKV(*torch.randn(2, layers, heads, tokens, size))
    head = ChunkKV(*torch.randn(2, layers, heads, n_head, size))
    cache = FusedCache(
        [FusedLayer(*torch.zeros(2, 1, heads, tokens, size), tokens) for _ in range(layers)]
    )
    rotation = Rotation(torch.zeros(layers, size // 2))  # turns nothing
    load_chunks(cache, rotation, [(0, chunk)], [(0, head)])
    correction = KVCorrection(temperature=temperature, head_strength=0.7)
    correction.follow_head(0, chunk, head, cache, rotation)
    for layer, got in enumerate(cache.stored()):
        values = chunk.values[layer].transpose(0, 1).flatten(1)
        for ours, stored, exact in zip(
            got, (chunk.keys, chunk.values), (head.keys, head.values), strict=True
        ):
            assert torch.equal(ours[0, :, :n_head], exact[layer])
            for token in range(n_head, tokens):
                alike = [
                    float(torch.cosine_similarity(values[token], of, 0)) for of in values[:n_head]
                ]
                total = sum(math.exp(one / temperature) for one in alike)
                expected = stored[layer, :, token].clone()
                for probe, one in enumerate(alike):
                    move = exact[layer, :, probe] - stored[layer, :, probe]
                    expected += 0.7 * math.exp(one / temperature) / total * move
                torch.testing.assert_close(ours[0, :, token], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_moves_the_rest_of_its_chunk_alone(tiny_engine, name, monkeypatch):
    """And nothing at ratio 0, where chunks are reused as they are."""
    monkeypatch.setattr(library_module, "HEAD_TOKENS", 5)
    engine = tiny_engine(name, stand_in=["The lamp burns.", "A keeper of the harbour."])
    prompt = build_prompt(engine, ["prefix", 12, 9, "fresh"])
    follows = KVCorrection(strength=0.0, head_strength=0.7)

    def stored(ratio: float, correction: KVCorrection | None = None):
        _, cache = engine.prepare(prompt, selector=Mend(ratio, correction, least=0))
        return [state for layer in cache.stored() for state in layer]

    at = prompt.layout(engine.runtime.planner.prefix_ids).chunks[0].start
    differ = torch.zeros(prompt.n_tokens, dtype=torch.bool)
    for moved, still in zip(stored(0.3, follows), stored(0.3), strict=True):
        differ |= (moved != still).any(-1)[0].any(0)  # the first layer knows no context
    assert differ[at + 5 : at + 12].all()
    assert not differ[: at + 5].any()
    assert not differ[at + 12 : at + 21].any()
    for moved, still in zip(stored(0.0, follows), stored(0.0), strict=True):
        assert torch.equal(moved[:, :, at : at + 21], still[:, :, at : at + 21])


@pytest.mark.parametrize("name", CONFIGS)
def test_mend_leaves_exact_chunks_alone(tiny_engine, name):
    """A chunk just after its prefix is neither picked nor moved."""
    engine = tiny_engine(name)
    prompt = build_prompt(engine, ["prefix", 12, 15, "fresh"])
    _, before = engine.prepare(prompt, selector="full_reuse")
    _, cache = engine.prepare(prompt, selector="mend", ratio=0.3)
    first = prompt.layout(engine.runtime.planner.prefix_ids).chunks[0]
    assert first.exact == first.stop - first.start
    assert len(cache.fusion.selected) == int(27 * 0.3)
    assert int(cache.fusion.selected.min()) >= first.stop
    with torch.inference_mode():
        engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, cache)
        )
    moved = 0.0
    for ours, theirs in zip(cache.layers, before.layers, strict=True):
        for mine, stored in zip(ours.stored(), theirs.stored(), strict=True):
            assert torch.equal(mine[:, :, : first.stop], stored[:, :, : first.stop])
            moved += float((mine - stored)[:, :, first.stop : first.stop + 15].abs().sum())
    assert moved > 0.0
