"""Packed weights compute what the model's own do, and belong to the engine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from a3_engine import A3Engine
from a3_engine.chunks.fingerprint import model_fingerprint
from a3_engine.model.loading import load_model
from a3_engine.model.packing import PackedLinear, pack
from tests.engine.models import build
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

PACKS = {
    torch.bfloat16: torch.cpu._is_avx512_bf16_supported(),
    torch.float32: torch.backends.mkl.is_available(),
}


@pytest.fixture(params=PACKS, ids=str)
def dtype(request):
    if not PACKS[request.param]:
        pytest.skip("this machine computes these weights as they are")
    return request.param


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(each, PackedLinear) for each in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 77), (300,)])
@torch.inference_mode()
def test_a_packed_layer_computes_the_same(dtype: torch.dtype, shape: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias, dtype=dtype)
    states = torch.randn(*shape, 192, dtype=dtype)[..., ::2]
    expected = nn.functional.linear(
        states.float(), linear.weight.float(), linear.bias.float() if bias else None
    )
    atol, rtol = (0.02, 0.01) if dtype == torch.bfloat16 else (1e-6, 1e-5)
    torch.testing.assert_close(PackedLinear(linear)(states).float(), expected, atol=atol, rtol=rtol)


def test_a_packed_model_refuses_what_would_lose_its_weights(dtype: torch.dtype, tmp_path: Path):
    model = tiny_model("llama").to(dtype)
    pack(model)
    for loss in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model_fingerprint(model),  # another engine asks for it
        model.half,
        lambda: model.to("meta"),
    ):
        with pytest.raises(RuntimeError, match="Load the model yourself"):
            loss()


def test_a_packed_model_may_be_called_with_gradients_on(dtype: torch.dtype):
    model = tiny_model("llama").to(dtype)
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    pack(model)
    assert (model(ids).logits - expected).abs().max() < 0.02 * expected.std()


def test_other_layers_stay_as_they_are(dtype: torch.dtype):
    """Weights in other dtypes, and inside code from elsewhere, which may look at them."""
    model = tiny_model("llama").to(dtype)
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    attention.k_proj.half()
    pack(model)
    kept = [n for n, each in model.named_modules() if type(each) is nn.Linear]
    assert [name.split("self_attn.")[1] for name in kept] == ["q_proj.0", "k_proj"]


def test_a_model_that_is_refused_answers_as_before(dtype: torch.dtype, tmp_path: Path):
    """Mamba's layers read the weights of their linear layers."""
    folder = tmp_path / "model"
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine = A3Engine.from_pretrained(folder, cache_dir=tmp_path, dtype=dtype, device="cpu")
    assert engine.unsupported_reason is not None
    assert engine.generate("what comes next?", max_new_tokens=3).report.generated_tokens > 0
    assert packed_layers(engine.runtime.model) == 0


def test_a_type_that_nobody_has_tested_stays_as_it_is(dtype: torch.dtype, tmp_path: Path):
    """transformers' own code of some models looks at weights of linear layers."""
    folder = tmp_path / "model"
    build("jais2").to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine = A3Engine.from_pretrained(folder, cache_dir=tmp_path, dtype=dtype, device="cpu")
    assert engine.unsupported_reason is None
    assert packed_layers(engine.runtime.model) == 0


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
def test_an_engine_packs_the_model_that_it_loads(dtype: torch.dtype, name: str, tmp_path: Path):
    """It answers as one around a given model, which stays whole, and reads that one's chunks."""
    folder, settings = tmp_path / "model", {"dtype": dtype, "device": "cpu"}
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given, tokenizer = load_model(folder, cache_dir=tmp_path, **settings)
    around = A3Engine.from_pretrained(given, tokenizer, cache_dir=tmp_path)
    loading = A3Engine.from_pretrained(folder, cache_dir=tmp_path, **settings)
    request = {"chunks": ["one two three four", "five six seven"], "logprobs": 1}
    answers = [
        engine.generate("what comes next?", max_new_tokens=4, ratio=1.0, **request)
        for engine in (around, loading)
    ]
    assert packed_layers(given) == 0
    assert packed_layers(loading.runtime.model) > 4
    assert around.fingerprint == loading.fingerprint
    assert answers[1].report.hits == 2
    first, second = (answer.report.logprobs[0].logprob for answer in answers)
    assert first == pytest.approx(second, abs=0.05)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected, logits = (each.runtime.model(ids).logits for each in (around, loading))
    assert (logits - expected).abs().max() < 0.02 * expected.std()
