"""Tiny configurations of what transformers has, by family: of each a model type and its values.

The sliding window is wider than what the gate tries first, and narrower than the survey's prompts.
"""

from __future__ import annotations

from typing import Any

from tests.tiny import DERIVED, SHAPE, rope

WINDOW = 64
Values = dict[str, Any]


def without(values: Values, *names: str) -> Values:
    return {name: value for name, value in values.items() if name not in names}


PLAIN = rope(rope_type="default")
HALF = rope(rope_type="default", partial_rotary_factor=0.5)
YARN = rope(rope_type="yarn", factor=16.0, original_max_position_embeddings=64)
MIXED = ["sliding_attention", "full_attention"] * 2
SLIDING = {"sliding_window": WINDOW, "layer_types": MIXED}
TWO = {"sliding_attention": rope(rope_type="default"), "full_attention": rope(rope_type="default")}
TWO["full_attention"]["rope_theta"] = 1e6
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOUR = {**EXPERTS, "num_experts": 4}
LOCAL = {**EXPERTS, "num_local_experts": 4}
ROUTED = {**EXPERTS, "n_routed_experts": 4}
SHARED = {"shared_expert_intermediate_size": 32}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0}

# Heads of several sizes, and layers that use another's keys and values.
PROPORTIONAL = rope(rope_type="proportional", partial_rotary_factor=0.25)
GEMMA4 = {
    **SHAPE,
    **SLIDING,
    "rope_parameters": {"sliding_attention": PLAIN, "full_attention": PROPORTIONAL},
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 32,
}
LARGE4 = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA4_31B = {**GEMMA4, **LARGE4, "hidden_size_per_layer_input": 0}
GEMMA4_E4B = {**GEMMA4, "num_kv_shared_layers": 2}
GEMMA4_26B = {**GEMMA4_31B, **FOUR, "enable_moe_block": True, "top_k_experts": 2}
UNIFIED = {**without(GEMMA4, "vocab_size_per_layer_input", "hidden_size_per_layer_input"), **LARGE4}
GEMMA3N = {
    **SHAPE,
    **SLIDING,
    "rope_parameters": TWO,
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "intermediate_size": [96] * 4,
    "altup_num_inputs": 4,
}
LAGUNA = {**SHAPE, **FOUR, **SHARED, **SLIDING, "num_attention_heads_per_layer": [8] * 4}

# Layers of other kinds between those with attention.
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
SECTIONED = rope(rope_type="default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1])
QWEN35 = {**SHAPE, **LINEAR, "rope_parameters": SECTIONED}
QWEN35_MOE = {**without(QWEN35, "intermediate_size"), **FOUR, **SHARED}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
MAMBA["mamba_chunk_size"] = 16
CONV = {"layer_types": ["conv", "full_attention"] * 2}

# Keys and values that are compressed together.
LATENT = {
    **DERIVED,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "num_key_value_heads": 8,
}
INDEX = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
LLAMA4 = {
    **SHAPE,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 64,
    "interleave_moe_layer_step": 2,
}
QWEN4 = {
    **without(SHAPE, "intermediate_size"),
    **LINEAR,
    **FOUR,
    **SHARED,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_count": 2,
    "hc_lowrank": 16,
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 1000,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
MINISTRAL3 = {**SHAPE, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}
MINISTRAL3["rope_parameters"] |= {"mscale_all_dim": 1.0, "mscale": 1.0}
MINISTRAL3_REAL = {**SHAPE, "rope_parameters": dict(MINISTRAL3["rope_parameters"])}
MINISTRAL3_REAL["rope_parameters"]["original_max_position_embeddings"] = 16384
MINIMAX3 = {
    **SHAPE,
    **LOCAL,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 16,
    "rotary_dim": 8,
}
MUSE = {**SHAPE, **SLIDING, "layer_rope_theta": [10000.0, 0] * 2}

# What sees pictures.
PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {**PICTURES, "model_type": "pixtral", "head_dim": 16}
DEEP = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
STACKED = {**DEEP, "deepstack_visual_indexes": [0]}
MUSE_PICTURES = without(PICTURES, "image_size", "patch_size")


def seeing(text: Values, vision: Values | None, **others: Any) -> Values:
    return {"text_config": dict(text), "vision_config": vision, **others}


CONFIGURATIONS: dict[str, dict[str, tuple[str, Values]]] = {
    "Llama and alike": {
        "llama": ("llama", SHAPE),
        "mistral": ("mistral", {**SHAPE, "sliding_window": WINDOW}),
        "ministral": ("ministral", {**SHAPE, **SLIDING}),
        "ministral3": ("ministral3", MINISTRAL3_REAL),
        "ministral3, queries scaled from 64 on": ("ministral3", MINISTRAL3),
        "qwen2": ("qwen2", DERIVED),
        "qwen2, windows": ("qwen2", {**DERIVED, **QWEN_WINDOW}),
        "qwen3": ("qwen3", SHAPE),
        "phi": ("phi", {**DERIVED, "rope_parameters": HALF}),
        "phi3": ("phi3", {**DERIVED, "sliding_window": WINDOW, "rope_parameters": HALF}),
        "granite": ("granite", {**DERIVED, **GRANITE}),
        "granitemoehybrid, attention only": (
            "granitemoehybrid",
            {**DERIVED, **GRANITE, "num_local_experts": 0, "shared_intermediate_size": 32}
            | {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"},
        ),
        "olmo": ("olmo", DERIVED),
        "olmo2": ("olmo2", DERIVED),
        "olmo3": ("olmo3", {**DERIVED, **SLIDING}),
        "seed_oss": ("seed_oss", SHAPE),
        "apertus": ("apertus", DERIVED),
        "apertus1p5_text": ("apertus1p5_text", DERIVED),
        "arcee": ("arcee", SHAPE),
        "nemotron": ("nemotron", {**SHAPE, "rope_parameters": HALF}),
        "starcoder2": ("starcoder2", {**DERIVED, "sliding_window": WINDOW}),
        "stablelm": (
            "stablelm",
            {**DERIVED, "rope_parameters": HALF, "qk_layernorm": True},
        ),
        "internlm3": ("internlm3", SHAPE),
        "jais2": ("jais2", SHAPE),
        "bitnet": ("bitnet", DERIVED),
        "cwm": ("cwm", {**SHAPE, "sliding_window": WINDOW}),
        "gpt_neox": ("gpt_neox", without(DERIVED, "num_key_value_heads")),
        "falcon": (
            "falcon",
            {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_kv_heads": 2}
            | {"num_attention_heads": 8, "new_decoder_architecture": True, "alibi": False},
        ),
    },
    "Gemma": {
        "gemma": ("gemma", SHAPE),
        "gemma2": ("gemma2", {**SHAPE, "sliding_window": WINDOW}),
        "gemma3_text": ("gemma3_text", {**SHAPE, **SLIDING, "rope_parameters": TWO}),
        "vaultgemma": (
            "vaultgemma",
            {**SHAPE, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
        ),
        "gemma3n_text": ("gemma3n_text", GEMMA3N),
        "gemma3n_text, none shared": ("gemma3n_text", {**GEMMA3N, "num_kv_shared_layers": 0}),
        "gemma4_text, alike": (
            "gemma4_text",
            {**GEMMA4, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        ),
        "gemma4_text, as 31B": ("gemma4_text", GEMMA4_31B),
        "gemma4_text, as 26B-A4B": ("gemma4_text", GEMMA4_26B),
        "gemma4_text, as E4B": ("gemma4_text", GEMMA4_E4B),
        "gemma4_unified_text": ("gemma4_unified_text", UNIFIED),
        "gemma4_unified_text, alike": (
            "gemma4_unified_text",
            {**without(UNIFIED, *LARGE4), "global_head_dim": 16},
        ),
    },
    "mixtures of experts": {
        "mixtral": (
            "mixtral",
            {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        ),
        "mixtral, no window": ("mixtral", {**SHAPE, "num_local_experts": 4}),
        "qwen2_moe": ("qwen2_moe", {**DERIVED, **FOUR, **SHARED}),
        "qwen2_moe, windows": ("qwen2_moe", {**DERIVED, **FOUR, **SHARED, **QWEN_WINDOW}),
        "qwen3_moe": ("qwen3_moe", {**SHAPE, **LOCAL}),
        "qwen3_moe, windows": ("qwen3_moe", {**SHAPE, **LOCAL, **QWEN_WINDOW}),
        "phimoe": (
            "phimoe",
            {**DERIVED, **without(LOCAL, "moe_intermediate_size"), "rope_parameters": PLAIN},
        ),
        "phimoe, windows": (
            "phimoe",
            {**DERIVED, **without(LOCAL, "moe_intermediate_size"), "rope_parameters": PLAIN}
            | {"sliding_window": WINDOW},
        ),
        "olmoe": ("olmoe", {**DERIVED, "num_experts": 4, "num_experts_per_tok": 2}),
        "flex_olmo": ("flex_olmo", {**DERIVED, "num_experts": 4, "num_experts_per_tok": 2}),
        "granitemoe": (
            "granitemoe",
            {**DERIVED, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "granitemoeshared": (
            "granitemoeshared",
            {**DERIVED, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"shared_intermediate_size": 32},
        ),
        "glm4_moe": ("glm4_moe", {**SHAPE, **ROUTED, "n_shared_experts": 1}),
        "minimax_m2": ("minimax_m2", {**SHAPE, **LOCAL, "rope_parameters": HALF}),
        "minimax_m3_vl_text": ("minimax_m3_vl_text", MINIMAX3),
        "minimax_m3_vl_text, sparse": (
            "minimax_m3_vl_text",
            {**MINIMAX3, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
        ),
        "dots1": ("dots1", {**SHAPE, **ROUTED, **QWEN_WINDOW, "n_shared_experts": 1}),
        "solar_open": ("solar_open", {**without(SHAPE, "intermediate_size"), **ROUTED}),
        "mellum": ("mellum", {**SHAPE, **LOCAL, **SLIDING, "rope_parameters": TWO}),
        "hy_v3": ("hy_v3", {**SHAPE, **FOUR}),
        "jetmoe": (
            "jetmoe",
            {**without(DERIVED, "num_attention_heads", "head_dim"), "kv_channels": 16}
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4},
        ),
        "laguna": (
            "laguna",
            {**LAGUNA, "rope_parameters": {"sliding_attention": PLAIN, "full_attention": HALF}},
        ),
        "laguna, one rotation": ("laguna", {**LAGUNA, "rope_parameters": TWO}),
        "mimo_v2_flash": (
            "mimo_v2_flash",
            {**SHAPE, **ROUTED, "v_head_dim": 8, "sliding_window": WINDOW},
        ),
        "llama4_text": ("llama4_text", LLAMA4),
        "llama4_text, one chunk": ("llama4_text", {**LLAMA4, "attention_chunk_size": 8192}),
    },
    "attention sinks": {
        "gpt_oss": (
            "gpt_oss",
            {**SHAPE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"rope_parameters": {**YARN, "truncate": False}},
        ),
        "granite_swa": (
            "granite_swa",
            {**DERIVED, "sliding_window": WINDOW, "layer_types": MIXED[::-1]},
        ),
        "granitemoe_swa": ("granitemoe_swa", {**DERIVED, **LOCAL, "sliding_window": WINDOW}),
    },
    "adjacent pairs": {
        "glm": ("glm", {**SHAPE, "rope_parameters": HALF}),
        "glm4": ("glm4", {**SHAPE, "rope_parameters": HALF}),
        "cohere": ("cohere", DERIVED),
        "cohere2": ("cohere2", {**SHAPE, **SLIDING}),
        "ernie4_5": ("ernie4_5", SHAPE),
        "ernie4_5_moe": (
            "ernie4_5_moe",
            {**DERIVED, "moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4},
        ),
        "helium": ("helium", {**SHAPE, "head_dim": 8}),
    },
    "layers without position, other ways of turning": {
        "smollm3": ("smollm3", {**DERIVED, "no_rope_layer_interval": 2}),
        "exaone4": ("exaone4", {**SHAPE, "sliding_window": WINDOW, "sliding_window_pattern": 2}),
        "exaone4, no window": (
            "exaone4",
            {**SHAPE, "sliding_window": None, "layer_types": ["full_attention"] * 4},
        ),
        "exaone_moe": (
            "exaone_moe",
            {**SHAPE, **FOUR, "sliding_window": WINDOW, "sliding_window_pattern": 2},
        ),
        "afmoe": (
            "afmoe",
            {**SHAPE, **FOUR, "num_shared_experts": 1, "sliding_window": WINDOW}
            | {"global_attn_every_n_layers": 2},
        ),
        "nanochat": ("nanochat", DERIVED),
        "kolibri1": (
            "kolibri1",
            {**without(SHAPE, "intermediate_size"), **LOCAL, **SHARED, "sliding_window": WINDOW},
        ),
        "hunyuan_v1_dense": ("hunyuan_v1_dense", SHAPE),
        "hunyuan_v1_dense, dynamic": (
            "hunyuan_v1_dense",
            {**SHAPE, "rope_parameters": rope(rope_type="dynamic", factor=1.0, alpha=1000.0)},
        ),
        "hunyuan_v1_moe": ("hunyuan_v1_moe", {**SHAPE, "num_experts": 4, "moe_topk": 2}),
    },
    "with pictures": {
        "mistral3": (
            "mistral3",
            seeing({**SHAPE, "model_type": "mistral"}, PIXTRAL, image_token_index=10),
        ),
        "mistral3, ministral3": (
            "mistral3",
            seeing({**MINISTRAL3_REAL, "model_type": "ministral3"}, PIXTRAL, image_token_index=10),
        ),
        "mistral3, queries scaled from 64 on": (
            "mistral3",
            seeing({**MINISTRAL3, "model_type": "ministral3"}, PIXTRAL, image_token_index=10),
        ),
        "qwen2_vl": (
            "qwen2_vl",
            seeing(
                {**DERIVED, "rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1]}},
                {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            ),
        ),
        "qwen2_5_vl": (
            "qwen2_5_vl",
            seeing(
                {**DERIVED, "rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1]}},
                {**DEEP, "fullatt_block_indexes": [0]},
            ),
        ),
        "qwen3_vl": (
            "qwen3_vl",
            seeing(
                {**SHAPE, "rope_parameters": {**PLAIN, "mrope_section": [4, 2, 2]}},
                STACKED,
            ),
        ),
        "qwen3_vl_moe": (
            "qwen3_vl_moe",
            seeing(
                {**SHAPE, **FOUR, "rope_parameters": {**PLAIN, "mrope_section": [4, 2, 2]}},
                STACKED,
            ),
        ),
        "gemma3": (
            "gemma3",
            seeing(
                {**SHAPE, **SLIDING, "rope_parameters": TWO},
                {**PICTURES, "model_type": "siglip_vision_model"},
                mm_tokens_per_image=4,
            ),
        ),
        "gemma4, as 31B": ("gemma4", seeing(GEMMA4_31B, None, audio_config=None)),
        "gemma4, as E4B": ("gemma4", seeing(GEMMA4_E4B, None, audio_config=None)),
        "gemma4_unified": ("gemma4_unified", seeing(UNIFIED, None, audio_config=None)),
        "smolvlm": (
            "smolvlm",
            seeing({**SHAPE, "model_type": "llama"}, PICTURES, scale_factor=2),
        ),
        "idefics3": (
            "idefics3",
            seeing({**SHAPE, "model_type": "llama"}, PICTURES, scale_factor=2),
        ),
        "internvl": (
            "internvl",
            seeing(
                {**SHAPE, "model_type": "qwen3"},
                {**PICTURES, "image_size": [28, 28], "patch_size": [14, 14]},
            ),
        ),
        "llava, qwen2": (
            "llava",
            seeing(
                {**DERIVED, "model_type": "qwen2"},
                {**PICTURES, "model_type": "clip_vision_model", "projection_dim": 32},
                image_token_index=10,
            ),
        ),
        "glm4v": (
            "glm4v",
            seeing(
                {**DERIVED, "rope_parameters": {**HALF, "mrope_section": [1, 1, 0]}},
                {**DEEP, "image_size": 28},
            ),
        ),
        "phi4_multimodal": (
            "phi4_multimodal",
            {**DERIVED, "rope_parameters": HALF, "vision_config": PICTURES}
            | {
                "audio_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_blocks": 1,
                    "num_attention_heads": 2,
                    "nemo_conv_channels": 16,
                    "ext_pw_out_channel": 32,
                }
            },
        ),
        "muse_spark": (
            "muse_spark",
            seeing(
                {**MUSE, **LOCAL, "moe_hidden_size": 32},
                MUSE_PICTURES,
                audio_config={"out_hidden_size": 64},
            ),
        ),
        "muse_glimmer": ("muse_glimmer", seeing(MUSE, MUSE_PICTURES)),
        "mllama": (
            "mllama",
            seeing(
                {**DERIVED, "cross_attention_layers": [3]},
                {**without(PICTURES, "num_attention_heads"), "attention_heads": 2}
                | {"num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 1}
                | {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
            ),
        ),
        "llama4": (
            "llama4",
            seeing(
                {**LLAMA4, "attention_chunk_size": 8192},
                {**PICTURES, "vision_output_dim": 64, "projector_input_dim": 32}
                | {"projector_output_dim": 64},
            ),
        ),
    },
    "hybrids": {
        "qwen3_next": (
            "qwen3_next",
            {**SHAPE, **LINEAR, **FOUR, **SHARED, "rope_parameters": HALF},
        ),
        "qwen3_5_text": ("qwen3_5_text", QWEN35),
        "qwen3_5": ("qwen3_5", seeing(QWEN35, STACKED)),
        "qwen3_5_moe_text": ("qwen3_5_moe_text", QWEN35_MOE),
        "qwen3_5_moe": ("qwen3_5_moe", seeing(QWEN35_MOE, STACKED)),
        "olmo_hybrid": ("olmo_hybrid", {**DERIVED, **LINEAR}),
        "lfm2": ("lfm2", {**DERIVED, **CONV, "block_auto_adjust_ff_dim": False}),
        "lfm2_moe": ("lfm2_moe", {**DERIVED, **CONV, **FOUR, "num_dense_layers": 1}),
        "lfm3": (
            "lfm3",
            {**SHAPE, "sliding_window": WINDOW}
            | {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
        ),
        "granitemoehybrid": (
            "granitemoehybrid",
            {**DERIVED, **GRANITE, **MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"shared_intermediate_size": 32, "layer_types": LINEAR["layer_types"]},
        ),
        "bamba": ("bamba", {**DERIVED, **MAMBA, "attn_layer_indices": [1, 3]}),
        "falcon_h1": ("falcon_h1", {**SHAPE, **MAMBA, "mamba_d_ssm": 128}),
        "nemotron_h": (
            "nemotron_h",
            {**without(SHAPE, "num_hidden_layers"), "ssm_state_size": 16, "mamba_num_heads": 8}
            | {"mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16}
            | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        ),
        "kimi_linear": (
            "kimi_linear",
            {**without(LATENT, "max_position_embeddings"), "q_lora_rank": None}
            | {"moe_intermediate_size": 32, "num_experts_per_token": 2, "num_experts": 4}
            | {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": LINEAR["layer_types"]},
        ),
        "zaya": (
            "zaya",
            {**without(SHAPE, "intermediate_size"), "moe_intermediate_size": 32}
            | {"num_experts": 4, "router_hidden_size": 16},
        ),
        "qwen4_exp_text": ("qwen4_exp_text", QWEN4),
        "qwen4_exp": ("qwen4_exp", seeing(QWEN4, STACKED)),
    },
    "latent attention": {
        "deepseek_v2": ("deepseek_v2", {**LATENT, **ROUTED, "n_group": 1, "topk_group": 1}),
        "deepseek_v3": (
            "deepseek_v3",
            {**LATENT, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        ),
        "deepseek_v32": (
            "deepseek_v32",
            {**LATENT, **ROUTED, **INDEX, "n_group": 1, "topk_group": 1},
        ),
        "deepseek_v4": (
            "deepseek_v4",
            {**without(SHAPE, "intermediate_size"), **ROUTED, "num_key_value_heads": 1}
            | {"q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16, "sliding_window": WINDOW}
            | {**INDEX, "index_topk": 16, "num_nextn_predict_layers": 0},
        ),
        "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, **ROUTED}),
        "mistral4": (
            "mistral4",
            {**LATENT, **ROUTED, "rope_parameters": MINISTRAL3_REAL["rope_parameters"]},
        ),
        "youtu": ("youtu", LATENT),
        "mistral_large4": ("mistral_large4", seeing({**LATENT, **ROUTED, **INDEX}, PIXTRAL)),
        "glm5_next": (
            "glm5_next",
            seeing(
                {**LATENT, **ROUTED, **INDEX, "qk_rope_head_dim": 0, "hc_mult": 2}
                | {"linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 4}
                | {"layer_types": ["linear_attention", "indexed_attention"] * 2},
                {**DEEP, "image_size": 28},
            ),
        ),
    },
}
