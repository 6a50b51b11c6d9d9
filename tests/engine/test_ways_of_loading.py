"""However a model was loaded: fused and right, or served by prefill with a reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    Mistral3Config,
    PreTrainedModel,
    Qwen3VLConfig,
    T5Config,
)

from a3_engine import A3Engine, devices
from a3_engine.chunks import fingerprint
from a3_engine.chunks.fingerprint import model_fingerprint
from a3_engine.errors import ModelLoadError
from a3_engine.model.loading import load_model
from tests.texts import ASK
from tests.tiny import SHAPE, rope, tiny_model, tiny_tokenizer

CHUNKS = [
    "The lamp of the lighthouse burns through the night.",
    "The northern shore is steep, and few boats land there.",
]
PIXELS = {"hidden_size": 32, "intermediate_size": 48}
VISION = {**PIXELS, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
PIXTRAL = {**PIXELS, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
TURNED = rope(rope_type="default", mrope_section=[4, 2, 2])
PICTURES = {
    "qwen3-vl": Qwen3VLConfig(
        text_config={**SHAPE, "rope_parameters": TURNED},
        vision_config={**VISION, "deepstack_visual_indexes": [0]},
    ),
    "mistral3": Mistral3Config(
        text_config={**SHAPE, "model_type": "mistral", "sliding_window": None},
        vision_config={**PIXTRAL, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
        image_token_index=10,
    ),
}


@pytest.fixture
def engine(tmp_path):
    """Builds engines around whatever is given."""
    engines = []

    def build(model: Any, *tokenizer: Any, **options: Any) -> A3Engine:
        given = tokenizer or (None if isinstance(model, (str, Path)) else tiny_tokenizer(),)
        engines.append(A3Engine.from_pretrained(model, *given, cache_dir=tmp_path, **options))
        return engines[-1]

    yield build
    for each in engines:
        each.close()


def assert_right(engine: A3Engine, own: PreTrainedModel, *, fused: bool = True) -> None:
    """The answer at ratio 1.0 is the one that an untouched copy of the model gives by itself."""
    prompt = engine.plan(ASK, CHUNKS)
    answer = engine.generate(prompt, ratio=1.0, max_new_tokens=8)
    ids = torch.tensor([prompt.ids])
    output = own.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = engine.runtime.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert (answer.text, answer.report.fused) == (text, fused)
    assert fused == (engine.unsupported_reason is None)


@pytest.mark.parametrize("name", PICTURES)
def test_models_with_pictures_are_loaded_by_name(tmp_path, engine, name):
    torch.manual_seed(0)
    own = AutoModelForImageTextToText.from_config(PICTURES[name]).eval()
    own.save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / name)
    assert_right(engine(str(tmp_path / name), dtype="float32", device="cpu"), own)


def test_an_error_of_loading_is_short(tmp_path):
    """transformers lists every model that it knows."""
    T5Config().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="T5Config") as caught:
        load_model(tmp_path, cache_dir=tmp_path)
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize("kernels", ["flash_attention_2", "flash_attention_3"])
def test_a_model_for_flash_attention_is_fused(engine, kernels):
    model = tiny_model("mistral")
    model.config._attn_implementation_internal = kernels  # its package is not needed to be told so
    assert_right(engine(model), tiny_model("mistral"))


def test_flash_attention_without_sdpa_becomes_the_models_own(engine):
    model = tiny_model("gemma2")
    model._supports_sdpa = False
    model.config._attn_implementation_internal = "flash_attention_2"
    assert_right(engine(model), tiny_model("gemma2"))


@pytest.mark.parametrize("kernels", ["eager", "sdpa"])
def test_attention_may_be_changed_later(engine, kernels):
    model = tiny_model("llama")
    own = engine(model)
    assert_right(own, tiny_model("llama"))
    model.set_attn_implementation(kernels)
    assert_right(own, tiny_model("llama"))
    assert own.generate(ASK, chunks=CHUNKS, ratio=0.3, max_new_tokens=2).report.fused


def test_an_offloaded_model_answers_by_prefill(engine):
    model = tiny_model("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    own = engine(model)
    assert_right(own, tiny_model("llama"), fused=False)
    assert "offloaded" in own.unsupported_reason


def test_weights_that_cannot_be_read_are_not_fused(engine):
    """torch's own int8 has none that could be told apart."""
    linear = {nn.Linear}
    quantized = [
        torch.ao.quantization.quantize_dynamic(tiny_model("llama"), linear) for _ in range(2)
    ]
    own = engine(quantized[0])
    assert_right(own, quantized[1], fused=False)
    assert own.unsupported_reason


def test_a_compiled_model_is_called_as_it_was(engine):
    assert_right(engine(torch.compile(tiny_model("llama"))), tiny_model("llama"))


class Adapted(nn.Module):
    """A model with adapters, as peft wraps it."""

    def __init__(self, base: PreTrainedModel, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base = base
        config = copy.copy(base.config)
        config.is_prompt_learning = is_prompt_learning
        self.peft_config = {"default": config}

    def get_base_model(self) -> PreTrainedModel:
        return self.base


def test_a_model_with_adapters_goes_on_with_them(engine):
    assert_right(engine(Adapted(tiny_model("llama"))), tiny_model("llama"))
    with pytest.raises(TypeError, match="learn a prompt"):
        engine(Adapted(tiny_model("llama"), is_prompt_learning=True))


def test_what_is_no_model_of_transformers_is_not_taken_for_a_path(engine):
    with pytest.raises(TypeError, match="Sequential"):
        engine(nn.Sequential())


def test_what_an_adapter_does_is_part_of_the_models_identity():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    names = {model_fingerprint(model)}
    layer.merged_adapters, layer.disable_adapters = [], False
    for layer.active_adapters in (["law"], ["med"]):
        for layer.scaling in ({"law": 2.0}, {"law": 8.0}):
            names.add(model_fingerprint(model))
    layer.disable_adapters = True
    names.add(model_fingerprint(model))
    layer.merged_adapters = ["law"]
    names.add(model_fingerprint(model))
    assert len(names) == 7


def test_weights_are_summed_in_pieces(monkeypatch):
    model = tiny_model("llama")
    whole = model_fingerprint(model)
    monkeypatch.setattr(fingerprint, "PIECE", 100)
    assert model_fingerprint(model) == whole
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[17, 5] += 0.25
    assert model_fingerprint(model) != whole


class Halves(torch.Tensor):
    """A weight made of two tensors, as torchao's are."""

    def __new__(cls, low: torch.Tensor, high: torch.Tensor) -> Halves:
        whole = torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype)
        whole.low, whole.high = low, high
        return whole

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_weights_made_of_tensors_are_read_by_those():
    names = set()
    for high in (1.0, 2.0):
        module = tiny_model(LlamaConfig(**SHAPE))
        both = Halves(torch.ones(4), torch.full((4,), high))
        module.model.norm._parameters["weight"] = both
        names.add(model_fingerprint(module))
    assert len(names) == 2


def test_bf16_that_a_gpu_only_emulates_is_not_chosen(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert devices.default_dtype(torch.device("cuda")) == torch.float16


def test_mps_is_for_those_who_ask_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.best_device() == torch.device("cpu")
    assert devices.default_dtype(torch.device("mps")) == torch.float16


def hits(engine: A3Engine) -> list[bool]:
    report = engine.generate(ASK, chunks=CHUNKS, max_new_tokens=1).report
    return [chunk.hit for chunk in report.chunks]


def change_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def exchange(model: PreTrainedModel) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2


def load_others(model: PreTrainedModel) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def switch_adapter(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_proj.active_adapters = ["med"]


@pytest.mark.parametrize("change", [change_in_place, exchange, load_others, switch_adapter])
def test_chunks_of_other_weights_are_never_served(engine, change):
    """The engine goes on as a new one would that had been given the changed model."""
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.merged_adapters, layer.active_adapters = [], ["law"]
    own = engine(model)
    own.precompute(CHUNKS, progress=False)
    assert hits(own) == [True, True]
    before = own.fingerprint
    change(model)
    assert hits(own) == [False, False]
    assert own.fingerprint == engine(model).fingerprint != before
    assert hits(engine(model)) == hits(own) == [True, True]


def test_refresh_reads_what_cannot_be_noticed(engine):
    model = tiny_model("llama")
    own = engine(model)
    own.precompute(CHUNKS, progress=False)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    assert hits(own) == [True, True]
    own.refresh()
    assert hits(own) == [False, False]
    assert own.fingerprint == engine(model).fingerprint
