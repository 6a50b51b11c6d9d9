"""Caches that steer the decoder layers they are passed through, and the hooks that ask them.

A model's forward hands its cache down to every decoder layer. A pre-hook on the layer finds it
there and lets it rewrite the layer's input. So a fusion pass, which travels on its cache, narrows
the model's own forward without a copy of model code; any other cache passes untouched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a3_engine.devices import send
from a3_engine.model.attention import install
from a3_engine.model.cache_argument import cache_in, with_cache
from a3_engine.model.folding import install_on
from a3_engine.model.kv_shape import mixers
from a3_engine.model.latent import expand_each, is_latent

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class SteeringCache(Cache):
    """A cache that may rewrite the input of the layers that it is passed through."""

    def before_layer(
        self, layer: nn.Module, index: int, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """The layer's arguments in place of these; None leaves them as they are."""
        return None

    def inputs(self, ids: torch.Tensor) -> Kwargs:
        """What a forward over these token ids, ``(prompts, tokens)``, is called with."""
        return {"input_ids": ids}


def unmade_mask(device: torch.device) -> torch.Tensor:
    """An attention mask that is never read: transformers leaves one of four dimensions alone.

    So it builds none of its own, and `SteeringCache.before_layer` puts the true one in its place.
    """
    return torch.empty(1, 1, 1, 1, device=device)


def arguments(module: nn.Module, ids: torch.Tensor, cache: Cache) -> Kwargs:
    """What a forward over token ids, ``(prompts, tokens)``, with this cache is called with."""
    inputs = cache.inputs(ids) if isinstance(cache, SteeringCache) else {"input_ids": ids}
    return {**inputs, **with_cache(module, cache)}


def run_pass(decoder: PreTrainedModel, ids: Sequence[Sequence[int]], cache: SteeringCache) -> None:
    """The decoder's forward over prompts as their cache steers it, without logits."""
    device = decoder.get_input_embeddings().weight.device
    decoder(**arguments(decoder, send(torch.tensor(ids), device), cache))


def install_hooks(model: PreTrainedModel) -> None:
    """Let a `SteeringCache` steer a model's decoder layers."""
    decoder = model.get_decoder()
    layers = decoder.layers
    owner = weakref.ref(model)  # the layers would hold their model, in a circle

    def hook_for(index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Args, kwargs: Kwargs) -> Any:
            cache = cache_in(kwargs)
            if not isinstance(cache, SteeringCache):
                return None
            if index == 0:
                whole = owner()
                assert whole is not None
                install(whole)  # its attention may have been changed since
            return cache.before_layer(layer, index, args, kwargs)

        return hook

    if getattr(layers, "_a3_hooks_installed", False):  # another engine shares the model
        return
    install(model)
    kept = mixers(decoder)
    layers._a3_hooks_installed = True  # type: ignore[assignment]
    for index, (layer, mixer) in enumerate(zip(layers, kept, strict=True)):
        if mixer is not None:
            install_on(mixer, index)
        if is_latent(layer):
            expand_each(layer)
        layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
