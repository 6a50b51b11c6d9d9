"""Linear layers in the order in which a CPU reads them.

oneDNN reorders a weight at every product with it. For the few rows of a decoding step that takes
longer than the product; here it is done once.
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
        In bf16, on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
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


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Exchange the model's bf16 linear layers on a CPU that multiplies bf16 natively.

    The model can be neither trained, saved nor moved afterwards, nor read by another engine. A
    weight that is an embedding too is kept for that as well. Nothing happens where torch cannot do
    it, nor to layers inside code from elsewhere (adapters, a model's repository), which may look at
    their weights.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return
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
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
