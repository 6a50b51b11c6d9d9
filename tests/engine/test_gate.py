"""The gate: a model is fused and right, or refused with a reason and right. Nothing in between."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from a3_engine import A3Engine, Precomputed, gate
from a3_engine.errors import UnsupportedModelError
from a3_engine.model.cache_argument import cache_in, other_cache
from tests.engine.models import CONFIGS, build
from tests.survey import looking
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import tiny_model

REFUSED = {
    "gpt2": "layers",
    "bloom": "layers",
    "opt": "no rotary",
    "deepseek-v3.2": "indexed_attention",
    "mamba": "no layer attends",
    "llama-dynamic": "dynamic",
    "ministral3": "moved to another position",
    "qwen2-moe": "not told of",
    "phimoe": "not told of",
}


def own_answer(engine: A3Engine, model, ids: list[int], n: int) -> str:
    """transformers' own greedy answer, by a model that no engine has touched."""
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n, pad_token_id=0)
    return engine.runtime.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(REFUSED)))
def test_one_chunk_behind_its_prefix_answers_like_transformers(tiny_engine, name):
    """Such a chunk is exact, so the answer is right at every ratio, whether fused or refused."""
    engine = tiny_engine(build(name).config)
    prompt = engine.plan(ASK, [LAMP])
    expected = own_answer(engine, build(name), prompt.ids, 16)
    for selector, ratio in (("full_reuse", 0.0), ("a3", 0.3), (None, 0.3)):
        answer = engine.generate(prompt, selector=selector, ratio=ratio, max_new_tokens=16)
        assert answer.text == expected
        assert answer.report.fallback_reason == engine.unsupported_reason


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_are_served_by_ordinary_prefill(tiny_engine, caplog, name):
    """With the reason, and nothing is stored for them."""
    engine = tiny_engine(build(name).config)
    assert engine.precompute([LAMP], progress=False) == Precomputed(0, 0)
    prompt = engine.plan(ASK, [LAMP, SHORE])
    answer = engine.generate(prompt, max_new_tokens=12)
    assert REFUSED[name] in answer.report.fallback_reason
    assert answer.report.fallback_reason in caplog.text
    assert answer.text == own_answer(engine, build(name), prompt.ids, 12)
    assert (engine.stats().entries, engine.evict("nothing")) == (0, 0)


@pytest.mark.parametrize("name", ["jais2"])
def test_an_untested_architecture_passes_with_a_warning(tiny_engine, caplog, name):
    engine = tiny_engine(build(name).config)
    assert engine.unsupported_reason is None
    assert engine.runtime.model.config.model_type in caplog.text
    assert not engine.runtime.gate.tested


def test_a_dtype_that_nobody_measured_is_refused(tmp_path, tiny_engine):
    engine = A3Engine.from_pretrained(
        tiny_model("llama", torch.float64), tiny_engine().runtime.tokenizer, cache_dir=tmp_path
    )
    assert "float64" in engine.unsupported_reason
    engine.close()


def test_longrope_is_fused_as_long_as_its_frequencies_hold(tiny_engine):
    """Beyond the length at which they change, and back below it, the answers stay right."""
    engine, fresh = tiny_engine("phi3-longrope"), tiny_model("phi3-longrope")
    short, long = engine.plan(ASK, [LAMP, SHORE]), engine.plan(ASK, [LAMP, SHORE] * 5)
    assert short.n_tokens + 16 < 256 < long.n_tokens
    for prompt, fused in ((short, True), (long, False), (short, True)):
        answer = engine.generate(prompt, ratio=1.0, max_new_tokens=16)
        assert answer.report.fused == fused
        assert answer.text == own_answer(engine, fresh, prompt.ids, 16)
        assert fused or "256" in answer.report.fallback_reason
    near = engine.generate(short, max_new_tokens=257 - short.n_tokens)  # would cross it in decoding
    assert not near.report.fused


def ignore_positions(model: nn.Module) -> None:
    """Positions are counted from the first row, whatever it is told."""
    rotary = model.model.rotary_emb
    ordinary = rotary.forward
    rotary.forward = lambda x, position_ids: ordinary(x, torch.arange(x.shape[1])[None])


def scale_positions(model: nn.Module) -> None:
    """Positions are stretched where the frequencies do not show it."""
    rotary = model.model.rotary_emb
    ordinary = rotary.forward
    rotary.forward = lambda x, position_ids: ordinary(x, position_ids * 2)


def add_positions(model: nn.Module) -> None:
    """Positions enter the hidden states as well."""
    layer = model.model.layers[0]
    ordinary = layer.forward

    def forward(hidden_states, position_ids, **kwargs):
        moved = hidden_states + 0.3 * position_ids.sin()[..., None]
        return ordinary(moved, position_ids=position_ids, **kwargs)

    layer.forward = forward


def forget_the_cache(model: nn.Module) -> None:
    """One layer keeps nothing for later."""
    attention = model.model.layers[2].self_attn
    ordinary = attention.forward
    attention.forward = lambda *args, **kwargs: ordinary(*args, **other_cache(kwargs, None))


def attend_alone(model: nn.Module) -> None:
    """Attention of its own, with a mask of its own: the usual one for rows without gaps."""

    def forward(self, hidden_states, position_embeddings, **arguments):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if (cache := cache_in(arguments)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        n_rows, n_keys = query.shape[2], key.shape[2]
        mask = torch.ones(n_rows, n_keys, dtype=torch.bool).tril(n_keys - n_rows)
        key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, mask, scale=self.scaling)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


SABOTAGE = [ignore_positions, scale_positions, add_positions, forget_the_cache, attend_alone]


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_the_self_check_refuses_what_it_cannot_fuse_rightly(tiny_engine, sabotage):
    """Models that look like Llama and behave otherwise; a refused one answers as it did."""
    engine = tiny_engine()
    tokenizer = engine.runtime.tokenizer
    changed, untouched = tiny_model("llama"), tiny_model("llama")
    sabotage(changed)
    sabotage(untouched)
    odd = A3Engine.from_pretrained(changed, tokenizer, cache_dir=engine.cache_dir)
    assert odd.unsupported_reason
    with pytest.raises(UnsupportedModelError, match="ordinary prefill"):
        odd.prepare(ASK, chunks=[LAMP])
    ids = torch.tensor([engine.plan(ASK, [LAMP]).ids])
    with torch.inference_mode():
        assert torch.equal(changed(ids).logits, untouched(ids).logits)
    odd.close()


@pytest.mark.parametrize("name", ["phi3-longrope", "gemma3", "qwen2-sliding"])
def test_the_long_probe_of_an_accelerator_is_passed(tiny_engine, monkeypatch, name):
    """Its length goes beyond windows, but not to where longrope changes its frequencies."""
    monkeypatch.setattr(gate, "CPU_LONG", gate.LONG)
    assert tiny_engine(name).unsupported_reason is None


def test_keys_that_are_repeated_after_the_cache_are_named():
    """JetMoE's attention is given the keys of its two heads twice, once for each expert."""
    model = looking.build("jetmoe")
    reason = gate.check_model(model, list(range(5, 300))).reason
    assert "gives its attention other keys and values than it keeps: 4 heads" in reason
