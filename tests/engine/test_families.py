"""Families of architectures: fused and exact in fp32, and let through in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

from a3_engine import A3Engine, gate, native
from a3_engine.model.packing import pack
from a3_engine.model.probe import TEXT
from tests.engine.test_exactness import (
    build_prompt,
    full_prefill,
    fused_logits,
    independent_full_reuse,
)
from tests.tiny import DERIVED, SHAPE, WINDOW, rope, tiny_model, tiny_tokenizer

PLAIN = rope(rope_type="default")
HALF = rope(rope_type="default", partial_rotary_factor=0.5)
MIXED = ["sliding_attention", "full_attention"] * 2
BOTH = dict.fromkeys(("sliding_attention", "full_attention"), PLAIN)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOUR = {**EXPERTS, "num_experts": 4}
LOCAL = {**EXPERTS, "num_local_experts": 4}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}
SLIDING = {"sliding_window": WINDOW, "layer_types": MIXED}
WITHOUT = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # attention sinks
    "gpt-oss": (
        "GptOss",
        {**SHAPE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": rope(rope_type="yarn", factor=4.0, truncate=False)},
    ),
    "granite-moe-swa": ("GraniteMoeSWA", {**DERIVED, **LOCAL, "sliding_window": WINDOW}),
    # pairs of components that are adjacent
    "glm": ("Glm", {**SHAPE, "rope_parameters": HALF}),
    "glm4": ("Glm4", {**SHAPE, "rope_parameters": HALF}),
    "cohere": ("Cohere", DERIVED),
    "ernie4.5": ("Ernie4_5", SHAPE),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        {**DERIVED, "moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4},
    ),
    "helium": ("Helium", {**SHAPE, "head_dim": 8}),
    # backwards, and layers without position
    "nanochat": ("NanoChat", DERIVED),
    "exaone4": ("Exaone4", {**SHAPE, "sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "exaone-moe": (
        "ExaoneMoe",
        {**SHAPE, **FOUR, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "afmoe": (
        "Afmoe",
        {**SHAPE, **FOUR, "num_shared_experts": 1, "sliding_window": WINDOW}
        | {"global_attn_every_n_layers": 2},
    ),
    # mixtures of experts
    "mixtral": ("Mixtral", {**SHAPE, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2-moe": ("Qwen2Moe", {**DERIVED, **FOUR, "shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3Moe", {**SHAPE, **LOCAL}),
    "olmoe": ("Olmoe", {**DERIVED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": ("GraniteMoe", {**DERIVED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe": ("Glm4Moe", {**SHAPE, **ROUTED, "rope_parameters": HALF}),
    "minimax-m2": ("MiniMaxM2", {**SHAPE, **LOCAL, "rope_parameters": HALF}),
    "dots1": ("Dots1", {**SHAPE, **ROUTED}),
    "phimoe": (
        "Phimoe",
        {**DERIVED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN},
    ),
    # dense ones that look like Llama
    "ministral": ("Ministral", {**SHAPE, **SLIDING}),
    "olmo3": ("Olmo3", {**DERIVED, **SLIDING}),
    "seed-oss": ("SeedOss", SHAPE),
    "apertus": ("Apertus", DERIVED),
    "arcee": ("Arcee", SHAPE),
    "starcoder2": ("Starcoder2", {**DERIVED, "sliding_window": WINDOW}),
    "stablelm": ("StableLm", {**DERIVED, "rope_parameters": HALF}),
    "nemotron": ("Nemotron", {**SHAPE, "rope_parameters": HALF}),
    "phi": ("Phi", {**DERIVED, "rope_parameters": HALF}),
    "gemma": ("Gemma", SHAPE),
    "vaultgemma": ("VaultGemma", {**SHAPE, **SLIDING, "attn_logit_softcapping": 5.0}),
    # Gemma 4 where its layers are alike
    "gemma4": (
        "Gemma4Text",
        {**SHAPE, **SLIDING, "rope_parameters": BOTH, "global_head_dim": 16}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 320},
    ),
    # with pictures, used for text
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**DERIVED, "rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1]}},
            "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**SHAPE, **SLIDING, "rope_parameters": BOTH},
            "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"intermediate_size": 48, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
}
MIX = ["prefix", "fresh", 9, "fresh", 14, "fresh"]


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, values = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    if "text_config" not in values:
        return tiny_model(config, dtype)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


@pytest.fixture
def engine(tmp_path, request):
    engine = A3Engine.from_pretrained(
        build(request.param), tiny_tokenizer(), cache_dir=tmp_path / "cache"
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("engine", FAMILIES, indirect=True)
def test_a_family_is_exact(engine):
    """At ratio 1.0 and 0.0, and in decoding."""
    assert engine.unsupported_reason is None
    prompt = build_prompt(engine, MIX)
    whole = full_prefill(engine, prompt).logits[0, -1]
    reuse = independent_full_reuse(engine, engine.runtime.model, prompt).logits[0, -1]
    for selector in ("mend", "a3"):
        for ratio, expected in ((1.0, whole), (0.0, reuse)):
            got = fused_logits(engine, prompt, selector, ratio)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    fused = engine.generate(prompt, ratio=1.0, max_new_tokens=12)
    plain = engine.generate(prompt, selector="full_prefill", max_new_tokens=12)
    assert (fused.report.fused, plain.report.fused) == (True, False)
    assert fused.text == plain.text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_let_through_in_bf16(name):
    text = tiny_tokenizer()(TEXT).input_ids
    assert gate.examine(build(name, torch.bfloat16), text).reason is None


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_family_may_be_packed(name):
    """None of its code looks at weights that are laid out for a CPU."""
    model, ids = build(name), torch.arange(3, 20)[None]
    assert model.config.get_text_config().model_type in gate.TESTED
    expected = model(ids).logits
    pack(model)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["gpt-oss", "granite-moe-swa"], indirect=True)
def test_sinks_are_exact_without_native_loops(engine, monkeypatch):
    monkeypatch.setattr(native, "attends", lambda *_: False)
    prompt = build_prompt(engine, MIX)
    whole = full_prefill(engine, prompt).logits[0, -1]
    got = fused_logits(engine, prompt, "mend", 1.0)
    torch.testing.assert_close(got, whole, atol=1e-3, rtol=0)
    fused = engine.generate(prompt, ratio=1.0, max_new_tokens=12)
    assert fused.text == engine.generate(prompt, selector="full_prefill", max_new_tokens=12).text
