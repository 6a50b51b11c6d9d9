"""The caches of several requests, as one batch for a decoding step.

Each request keeps its own cache. A step takes one token of each: the model's matrix products see a
batch, and only attention goes over the caches one by one, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from a3_engine.model.folding import Folding
from a3_engine.model.hooks import Args, Kwargs, SteeringCache, arguments, unmade_mask
from a3_engine.model.masks import DecodeMask


class BatchLayer:
    """The caches of one layer."""

    is_sliding = False  # transformers would make a mask for it; attention sees `DecodeMask` instead
    is_compileable = False
    is_initialized = True

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self.keys = layers[0].keys  # Llama 3.2 with pictures asks whether there are any

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append each request's key and value; returns every request's whole keys and values."""
        pairs = [
            layer.update(keys[place : place + 1], values[place : place + 1])
            for place, layer in enumerate(self._layers)
        ]
        return [key for key, _ in pairs], [value for _, value in pairs]


class BatchStates(LinearAttentionLayer):
    """The states of one layer that folds tokens into them; see :mod:`a3_engine.model.folding`."""

    def __init__(self, layers: Sequence[Folding]) -> None:
        super().__init__(layers[0].number_of_states)
        self._layers = layers

    def take(self, inputs: torch.Tensor) -> torch.Tensor:
        """Let each request keep its input, and line up their states."""
        for place, layer in enumerate(self._layers):
            layer.take(inputs[place : place + 1])
        first = self._layers[0]
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), True)
        self.conv_kernel_size = first.conv_kernel_size
        self.is_conv_states_initialized = first.is_conv_states_initialized
        self.is_recurrent_states_initialized = first.is_recurrent_states_initialized
        for name, together in self._states().items():
            for index in together:
                states = [getattr(layer, name)[index] for layer in self._layers]
                together[index] = None if states[0] is None else torch.cat(states)
        return inputs

    def give(self, outputs: torch.Tensor) -> torch.Tensor:
        """Hand the states back."""
        for name, together in self._states().items():
            for index, states in together.items():
                for layer, own in zip(self._layers, () if states is None else states, strict=False):
                    getattr(layer, name)[index] = own[None]
        return outputs

    def _states(self) -> dict[str, dict[int, torch.Tensor | None]]:
        return {"conv_states": self.conv_states, "recurrent_states": self.recurrent_states}


def _together(layers: Sequence[Any]) -> Any:
    first = layers[0]
    if first.keys is not None and not first.keys.numel():
        return first  # it keeps nothing, as a layer that attends to pictures where there are none
    if not isinstance(first, Folding):
        return BatchLayer(layers)
    return first if len(layers) == 1 else BatchStates(layers)


class BatchCache(SteeringCache):
    """Caches of requests that are all past their first token.

    Parameters
    ----------
    caches : sequence of Cache
        One a request.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        by_layer = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[_together(layers) for layers in by_layer])
        self.lengths = [cache.get_seq_length() for cache in caches]
        self.mask = DecodeMask()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def before_layer(
        self, layer: nn.Module, index: int, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        return args, {**kwargs, "attention_mask": self.mask}

    def inputs(self, ids: torch.Tensor) -> Kwargs:
        return {
            "input_ids": ids,
            "position_ids": torch.tensor(self.lengths, device=ids.device)[:, None],
            "attention_mask": unmade_mask(ids.device),
        }


def step(
    model: nn.Module, ids: Sequence[int], caches: Sequence[Cache], device: Any
) -> torch.Tensor:
    """Logits after one token of each request, shape ``(requests, 1, vocabulary)``.

    Parameters
    ----------
    model : Module
        With the hooks of the fusion pass.
    ids : sequence of int
        A token for each request.
    caches : sequence of Cache
        Theirs; each grows by its token.
    """
    tokens = torch.tensor(ids, device=device)[:, None]
    logits: torch.Tensor = model(
        **arguments(model, tokens, BatchCache(caches)), use_cache=True
    ).logits
    return logits
