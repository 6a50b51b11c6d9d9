"""Tiny models that are made anew for one test."""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny import DERIVED, SHAPE, rope, tiny_model

SMALL = {"vocab_size": 320, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}


GPT = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 512}


EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


MLA = dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 16)
MLA |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "num_key_value_heads"), 8)
MLA |= dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1)


WINDOWED = {"use_sliding_window": True, "sliding_window": 60, "max_window_layers": 2}


SCALED = rope(
    rope_type="yarn", factor=8.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1
)


LINEAR = {f"linear_{part}": 16 for part in ("key_head_dim", "value_head_dim")}
LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": ("Bloom", {**SMALL, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {**SMALL, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "deepseek-v3.2": ("DeepseekV32", {**DERIVED, **EXPERTS, **MLA, "n_routed_experts": 4}),
    "mamba": ("Mamba", {**SMALL, "num_hidden_layers": 2, "state_size": 8}),
    "qwen3-next": ("Qwen3Next", {**SHAPE, **EXPERTS, **LINEAR, "num_experts": 4}),
    "llama-dynamic": ("Llama", {**SHAPE, "rope_parameters": rope(rope_type="dynamic", factor=2.0)}),
    # Scales queries by their position, from a 64th of the real one's on.
    "ministral3": ("Ministral3", {**SHAPE, "rope_parameters": SCALED}),
    "stablelm": ("StableLm", DERIVED),
    "starcoder2": ("Starcoder2", DERIVED),
    "mixtral": ("Mixtral", {**SHAPE, "num_local_experts": 4}),
    "gpt-oss": ("GptOss", {**SHAPE, "num_local_experts": 4, "rope_parameters": rope()}),
    "exaone4": ("Exaone4", SHAPE),
    "diffllama": ("DiffLlama", DERIVED),
    "persimmon": ("Persimmon", DERIVED),
    "doge": ("Doge", DERIVED),
    "jais2": ("Jais2", SHAPE),
    # Windows that the model applies by its mask alone, wider than what the gate tries.
    "qwen2-moe": ("Qwen2Moe", {**DERIVED, **WINDOWED, **EXPERTS, "num_experts": 4}),
    "phimoe": ("Phimoe", {**DERIVED, "num_local_experts": 4, "sliding_window": 60}),
}


def build(name: str):
    kind, values = CONFIGS[name]
    return tiny_model(getattr(transformers, f"{kind}Config")(**values))
