"""Tiny random models of each architecture, and a tokenizer trained on the spot. No download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteSWAConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 320
# To tiny tokenizers the shipped passages are 2,108 tokens, which every chunk of a model with a long
# window would pay for.
STAND_IN = ["Harbour\nTwo boats lie there.", "Mill\nIt ground corn."]
WINDOW = 12  # shorter than every test prompt

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = LlamaConfig(**{**SHAPE, "max_position_embeddings": 32_768})

# These derive the head's size from the hidden size.
DERIVED = {key: value for key, value in SHAPE.items() if key != "head_dim"}


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **values}


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-llama3": LlamaConfig(
        **SHAPE,
        rope_parameters=rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": LlamaConfig(
        **SHAPE,
        rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-sliding": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**SHAPE),
    "phi3": Phi3Config(
        **DERIVED, rope_parameters=rope(rope_type="default", partial_rotary_factor=0.5)
    ),
    "phi3-longrope": Phi3Config(
        **DERIVED,
        original_max_position_embeddings=256,
        rope_parameters=rope(
            rope_type="longrope",
            short_factor=[1.0 + 0.1 * i for i in range(4)],
            long_factor=[2.0 + 0.5 * i for i in range(4)],
            original_max_position_embeddings=256,
        ),
    ),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
    "granite": GraniteConfig(
        **DERIVED,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_multiplier=0.2,
    ),
    "olmo2": Olmo2Config(**DERIVED),
    "granite-swa": GraniteSWAConfig(**DERIVED, sliding_window=WINDOW, attention_multiplier=0.2),
    "cohere2": Cohere2Config(
        **SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "lfm2": Lfm2Config(
        **DERIVED,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "full_attention", "conv"],
    ),
}


def tiny_model(
    config: PretrainedConfig | str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with weights large enough that attention has something to say."""
    if isinstance(config, str):
        config = CONFIGS[config]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), dtype=dtype)
    return strengthened(model)


def strengthened(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, in place."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(6.0)
            elif name.endswith("sinks"):
                weight.normal_(1.0)
    return model.eval()


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims its messages, has no system role and wants strict turns, as Gemma's does.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)

CORPUS = [
    "The lighthouse stands on the northern shore and its lamp burns through the night.",
    "Question: who keeps the lamp? Answer: the keeper of the harbour, every evening.",
    "Context information is below. Given the context, answer the query.",
]


def tiny_tokenizer(
    chat_template: str | None = CHATML, *, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )
