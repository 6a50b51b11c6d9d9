"""The fusion pass: the model's own forward, narrowed to the rows that are computed.

`FusionPass` hooks in before every decoder layer. It slices the hidden states to the current rows,
hands the layer their positions as an exact mask, and lets the layer's `update` of the cache write
the rows' keys and values over the loaded ones. No model code is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.layout import Layout
from a3_engine.fusion.selectors.base import BoundarySelector, LayerSelector, Selector, States
from a3_engine.model.attention import Rows, project


class Abandoned(Exception):
    """Nobody waits for this request any more; its computation stops."""


class FusionPass:
    """One request's walk through the layers.

    Parameters
    ----------
    cache : FusedCache
        Loaded, every layer pending.
    layout : Layout
        Where the prompt's parts stand.
    selector : Selector
        Picks the chunk tokens to recompute. At ratio 1.0 and 0.0 there is nothing to pick.
    abandoned : callable
        Asked before every layer; true stops the pass with :class:`Abandoned`.

    Attributes
    ----------
    selected : torch.Tensor or None
        Sorted positions of the recomputed chunk tokens, once they are known.
    select_seconds : float
        Time spent on choosing them, the dense layers of a `LayerSelector` included.
    """

    def __init__(
        self,
        cache: FusedCache,
        layout: Layout,
        selector: Selector,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cache = cache
        self.layout = layout
        self.selector = selector
        self.abandoned = abandoned
        self.selected: torch.Tensor | None = None
        self.select_seconds = 0.0
        self.rows = torch.arange(layout.n_tokens)
        self._started = time.perf_counter()
        cache.fusion = self

        if selector.ratio >= 1.0:
            self._take(layout.chunk_positions)
        elif selector.budget(layout) == 0 and selector.ratio <= 0.0:
            self._take(torch.empty(0, dtype=torch.long))
        elif isinstance(selector, BoundarySelector):
            self._take(selector.select(layout))

    def _take(self, selected: torch.Tensor) -> None:
        self.selected = torch.unique(selected.cpu())
        if self.selector.ratio < 1.0:
            self.rows = torch.unique(torch.cat([self.selected, self.layout.fresh]))

    def before_layer(
        self, layer: nn.Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Narrow a layer's input to the rows that it computes; the layer's forward pre-hook."""
        if self.abandoned():
            raise Abandoned
        if (
            self.selected is None
            and isinstance(self.selector, LayerSelector)
            and index == self.selector.layer
        ):
            self._select_at(layer, index, args, kwargs)
        self.cache.layers[index].rows = self.rows
        args, kwargs = self._narrow(args, kwargs)
        return args, {**kwargs, "attention_mask": Rows(self.rows)}

    def _select_at(
        self, layer: nn.Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert isinstance(self.selector, LayerSelector)
        cached = self.cache.layers[index]
        query, key, value = project(layer, args, kwargs)
        stored_key, stored_value = cached.stored()
        self._take(
            self.selector.select(
                self.layout, States(query, key, value), States(None, stored_key, stored_value)
            )
        )
        # This layer's states were computed for every token: the fresh ones are the exact ones.
        cached.write(torch.arange(self.layout.n_tokens), key, value)
        self.select_seconds = time.perf_counter() - self._started

    def _narrow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Slice what is still as long as the prompt; hidden states may be narrow already."""
        n_tokens, n_rows = self.layout.n_tokens, len(self.rows)
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == n_tokens and n_rows < n_tokens:
            hidden = hidden[:, self.rows.to(hidden.device)]
        kwargs = dict(kwargs)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        if n_rows < n_tokens:
            rows = self.rows.to(hidden.device)
            if (tables := kwargs.get("position_embeddings")) is not None:
                kwargs["position_embeddings"] = tuple(table[:, rows] for table in tables)
            if (positions := kwargs.get("position_ids")) is not None:
                kwargs["position_ids"] = positions[:, rows]
        return args, kwargs


def install_hooks(layers: nn.ModuleList) -> None:
    """Let a pending `FusedCache` steer these decoder layers; any other call passes untouched."""

    def hook_for(index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = kwargs.get("past_key_values")
            if (
                isinstance(cache, FusedCache)
                and cache.fusion is not None
                and cache.layers[index].pending
            ):
                return cache.fusion.before_layer(layer, index, args, kwargs)
            return None

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
