"""Layers that fold all tokens into one state: linear attention, state spaces, short convolutions.

Such a layer has no keys; its state after a token follows from its inputs at all tokens up to that
one. So it is these inputs that are kept of each token, as a layer of attention keeps keys and
values: a fusion pass writes those of its rows over the stored ones, the model's own code folds all
of them anew, and its outputs at the rows go on. Where every row is computed, that is the model's
own prefill.

What it takes to do so is one module of the layer, the *mixer*: it is called with hidden states and
the cache, and finds its state in the cache (``get_conv_state`` and alike).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from a3_engine.devices import send
from a3_engine.kv import LayerShape
from a3_engine.model.cache_argument import cache_in


class Folding(LinearAttentionLayer):
    """The state of a mixer, beside its inputs, which are kept like keys and values.

    To be mixed into a layer of a cache that holds those, and is given ``shape``.
    """

    shape: LayerShape
    rows: torch.Tensor | None = None  # where a pass's inputs belong; else after all others
    _folded = 0  # tokens in the state
    _wanted: torch.Tensor | None = None  # those whose outputs go on; None for all

    def take(self, inputs: torch.Tensor) -> torch.Tensor:
        """Keep the inputs of some tokens; what the mixer computes, ``(prompts, tokens, size)``.

        That is these inputs alone where the state is that of the tokens before them, else all.
        """
        layer: Any = self
        before, rows = layer.get_seq_length(), self.rows
        keys, values = layer.update(*self.shape.cut(inputs))
        n_kept = keys.shape[2]
        fresh = not before or self._folded != before  # or cut back since
        self._folded, self._wanted = n_kept, None
        if not fresh:
            return inputs
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        if inputs.shape[1] == n_kept:
            return inputs
        self._wanted = torch.arange(before, n_kept) if rows is None else rows
        return self.shape.joined(keys, values, inputs.shape[2]).to(inputs.dtype)

    def give(self, outputs: torch.Tensor) -> torch.Tensor:
        """The mixer's outputs at the tokens that were taken."""
        if self._wanted is None:
            return outputs
        wanted, self._wanted = send(self._wanted, outputs.device), None
        return outputs.index_select(1, wanted)


class OrdinaryFolding(DynamicLayer, Folding):
    """The layer of an ordinary cache that keeps a mixer's inputs too."""

    lazy_initialization = LinearAttentionLayer.lazy_initialization  # type: ignore[assignment]

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, shape: LayerShape) -> None:
        LinearAttentionLayer.__init__(self, shape.folds)
        DynamicLayer.__init__(self)
        self.shape = shape

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


def install_on(mixer: nn.Module, index: int) -> None:
    """Let a cache's layer of this index give a mixer its inputs and take its outputs."""

    def layer_of(kwargs: dict[str, Any]) -> Any:
        cache = cache_in(kwargs)
        layer = cache.layers[index] if isinstance(cache, Cache) and len(cache.layers) else None
        return layer if hasattr(layer, "take") else None

    def before(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = layer_of(kwargs)
        if layer is None:
            return None
        kwargs = {**kwargs, "attention_mask": None}  # no token is one of padding
        if args:
            return (layer.take(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": layer.take(kwargs["hidden_states"])}

    def after(mixer: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        layer = layer_of(kwargs)
        return None if layer is None else layer.give(outputs)

    mixer.register_forward_pre_hook(before, with_kwargs=True)
    mixer.register_forward_hook(after, with_kwargs=True)
