"""Linear layers as GPTQ and AWQ leave them: no ``weight``, and packed numbers in buffers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from a3_engine import A3Engine
from a3_engine.chunks.fingerprint import model_fingerprint
from a3_engine.errors import ModelLoadError
from a3_engine.model.loading import load_model
from tests.engine.test_ways_of_loading import assert_right, hits
from tests.tiny import tiny_model, tiny_tokenizer

GROUP = 32  # inputs that share a scale
IN_ORDER, AWQ_ORDER = range(8), (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight numbers in an int32


def packed(numbers: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Eight numbers of 4 bits, along the last axis, in each int32."""
    eights = numbers.long().unflatten(-1, (-1, 8))[..., list(order)]
    whole = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def unpacked(whole: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    numbers = (whole[..., None] >> (4 * torch.arange(8))) & 15
    return numbers[..., torch.tensor(order).argsort()].flatten(-2)


class Quantized(nn.Module):
    """Four bits a weight, with a zero point and a scale for each group of inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().T.unflatten(0, (-1, GROUP))  # (groups, inputs, outputs)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 15)
        numbers = (weight / scales + zeros).round().clamp(0, 15).flatten(0, 1)
        self.register_buffer("scales", scales[:, 0])
        self.pack(numbers, zeros[:, 0])

    def weight_of(self, numbers: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        groups = torch.arange(self.in_features) // GROUP
        return self.scales[groups] * (numbers - zeros[groups])


class Gptq(Quantized):
    """Packed along the inputs; zero points are stored less one."""

    def pack(self, numbers: torch.Tensor, zeros: torch.Tensor) -> None:
        self.register_buffer("qweight", packed(numbers.T, IN_ORDER).T.contiguous())
        self.register_buffer("qzeros", packed(zeros - 1, IN_ORDER))
        self.register_buffer("g_idx", torch.arange(self.in_features).int() // GROUP)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        numbers = unpacked(self.qweight.T, IN_ORDER).T
        return states @ self.weight_of(numbers, unpacked(self.qzeros, IN_ORDER) + 1)


class Awq(Quantized):
    """Packed along the outputs, in an order of its own."""

    def pack(self, numbers: torch.Tensor, zeros: torch.Tensor) -> None:
        self.register_buffer("qweight", packed(numbers, AWQ_ORDER))
        self.register_buffer("qzeros", packed(zeros, AWQ_ORDER))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        numbers = unpacked(self.qweight, AWQ_ORDER)
        return states @ self.weight_of(numbers, unpacked(self.qzeros, AWQ_ORDER))


class Repacked(Awq):
    """Its kernel keeps the weights where only itself finds them, and the bias where all do."""

    def pack(self, numbers: torch.Tensor, zeros: torch.Tensor) -> None:
        weight = self.weight_of(numbers, zeros)
        self.register_buffer("bias", torch.zeros(self.out_features))
        self.multiply: Callable[[torch.Tensor], torch.Tensor] = lambda states: states @ weight
        del self.scales

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.multiply(states) + self.bias


def quantized(kind: type[Quantized]) -> PreTrainedModel:
    """A tiny model whose linear layers, but for the last one, are of this kind."""
    model = tiny_model("llama")
    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


@pytest.fixture
def engine(tmp_path):
    engines = []

    def build(model: PreTrainedModel) -> A3Engine:
        engines.append(A3Engine.from_pretrained(model, tiny_tokenizer(), cache_dir=tmp_path))
        return engines[-1]

    yield build
    for each in engines:
        each.close()


@pytest.mark.parametrize("kind", [Gptq, Awq])
def test_what_is_in_buffers_is_fused(engine, kind):
    assert_right(engine(quantized(kind)), quantized(kind))


@pytest.mark.parametrize("kind", [Gptq, Awq])
def test_each_buffer_is_part_of_the_models_identity(kind):
    model = quantized(kind)
    names = {model_fingerprint(model), model_fingerprint(quantized(kind))}
    assert len(names) == 1
    layer = model.model.layers[1].mlp.up_proj
    buffers = dict(layer.named_buffers())
    for buffer in buffers.values():
        buffer[-1] += 1
        names.add(model_fingerprint(model))
    assert len(names) == 1 + len(buffers)


def test_buffers_that_are_changed_are_noticed(engine):
    """In place, and by others in their place, as when weights are loaded anew."""
    model = quantized(Gptq)
    own = engine(model)
    layer = model.model.layers[1].mlp.up_proj
    assert [hits(own), hits(own)] == [[False, False], [True, True]]
    layer.scales.mul_(1.5)
    assert [hits(own), hits(own)] == [[False, False], [True, True]]
    layer.qweight = layer.qweight.flip(0)
    assert [hits(own), hits(own)] == [[False, False], [True, True]]
    assert own.fingerprint == engine(model).fingerprint


def test_weights_that_a_kernel_hides_are_not_fused(engine):
    own = engine(quantized(Repacked))
    assert_right(own, quantized(Repacked), fused=False)
    assert "Repacked" in own.unsupported_reason
    assert "cannot be read" in own.unsupported_reason


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_error_of_loading_says_what_to_install(tmp_path, method):
    """Without the package that quantizes, which is no part of this project's extras."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="pip install") as caught:
        load_model(tmp_path, cache_dir=tmp_path)
    assert len(str(caught.value)) <= 600
