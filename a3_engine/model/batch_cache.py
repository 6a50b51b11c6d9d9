"""The caches of several requests, as one batch for a decoding step.

Each request keeps its own cache. A step takes one token of each: the model's matrix products see a
batch, and only attention goes over the caches one by one, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from a3_engine.model.hooks import Args, Kwargs, SteeringCache, arguments, unmade_mask
from a3_engine.model.masks import DecodeMask


class BatchLayer:
    """The caches of one layer."""

    is_sliding = False  # transformers would make a mask for it; attention sees `DecodeMask` instead
    is_compileable = False
    is_initialized = True

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append each request's key and value; returns every request's whole keys and values."""
        pairs = [
            layer.update(keys[place : place + 1], values[place : place + 1])
            for place, layer in enumerate(self._layers)
        ]
        return [key for key, _ in pairs], [value for _, value in pairs]


class BatchCache(SteeringCache):
    """Caches of requests that are all past their first token.

    Parameters
    ----------
    caches : sequence of Cache
        One a request.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        by_layer = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[BatchLayer(layers) for layers in by_layer])  # type: ignore[misc]
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
