"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Of each token such a layer keeps a latent, from which the keys and values of all its heads are
expanded, and the part of the keys that is turned, which all heads share. Here the turned part
counts as the key of a single head and the latent as its value; transformers' caches have them the
other way round.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn


def is_latent(layer: nn.Module) -> bool:
    """Whether a decoder layer expands what it keeps."""
    return hasattr(getattr(layer, "self_attn", None), "expand_kv")


def expanded(
    layer: nn.Module, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that a layer attends to, from those that it keeps."""
    if not is_latent(layer):
        return keys, values
    pair: tuple[torch.Tensor, torch.Tensor] = layer.self_attn.expand_kv(values, keys)  # type: ignore[union-attr, operator]
    return pair


def expand_each(layer: nn.Module) -> None:
    """Let a layer expand what several requests keep, given as lists; tensors as before."""
    kind: Any = type(layer.self_attn)
    expand = kind.expand_kv
    if hasattr(expand, "__wrapped__"):
        return

    @wraps(expand)
    def expand_kv(self: nn.Module, latents: Any, turned: Any) -> tuple[Any, Any]:
        if isinstance(latents, list):
            pairs = [expand(self, *each) for each in zip(latents, turned, strict=True)]
            return [key for key, _ in pairs], [value for _, value in pairs]
        pair: tuple[torch.Tensor, torch.Tensor] = expand(self, latents, turned)
        return pair

    kind.expand_kv = expand_kv


class Kept:
    """Stands in for a cache where only what a layer keeps is wanted."""

    def __init__(self) -> None:
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, latent: torch.Tensor, turned: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states = turned, latent
        return latent, turned
