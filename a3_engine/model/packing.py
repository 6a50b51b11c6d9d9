"""Linear layers in the order in which a CPU reads them.

oneDNN, which multiplies bf16, reorders a weight at every product with it; MKL, which multiplies
fp32, reads a weight more quickly by its columns. For few rows the one takes longer than the
product, the other costs up to a fifth of it; here the order is made once.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn


class PackedLinear(nn.Module):
    """An `nn.Linear` without parameters: its weight is laid out for this machine's kernels.

    Parameters
    ----------
    linear : nn.Linear
        In bf16 or fp32, on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight)
            if weight.dtype == torch.bfloat16
            else weight.t().contiguous().t()
        )
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if not self._weight.is_mkldnn:
            return nn.functional.linear(states, self._weight, self._bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, "none", [], ""
        )
        return product

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "The engine has laid out this model's weights for its CPU; it cannot be saved, moved, "
            "converted or given to another engine. Load the model yourself and give it to "
            "A3Engine.from_pretrained(model, tokenizer), which leaves it as it is."
        )

    # All that saves, fingerprints, moves or converts a module comes to these two.
    _save_to_state_dict = _apply = _refuse


@torch.no_grad()  # what inference mode makes, no gradient may pass through
def pack(model: nn.Module) -> None:
    """Exchange the linear layers, in fp32 where torch has MKL, in bf16 where it is the CPU's own.

    The model can be neither trained, saved nor moved afterwards, nor read by another engine. A
    weight that is an embedding too is kept for that as well. Nothing happens where torch cannot do
    it, nor to layers inside code from elsewhere (adapters, a model's repository), which may look at
    their weights; code of transformers for some models does as well, so this is for proven ones.
    """
    for parent in list(model.modules()):
        if not type(parent).__module__.startswith("transformers.models."):
            continue
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _fits(child.weight):
                try:
                    setattr(parent, name, PackedLinear(child))
                except (AttributeError, NotImplementedError, RuntimeError):
                    return  # not torch's public interface: other versions may do without


def _fits(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return weight.dtype == torch.float32 and has_mkl
