"""The fusion pass: the model's own forward, narrowed to the rows that are computed.

`FusionPass` hooks in before every decoder layer. It slices the hidden states to the current rows,
hands the layer their positions as an exact mask, and lets the layer's `update` of the cache write
the rows' keys and values over the loaded ones. No model code is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.drift import Drift
from a3_engine.fusion.layout import Layout
from a3_engine.fusion.selectors.base import BoundarySelector, LayerSelector, Selector, States
from a3_engine.model.attention import Observer, Rows, project


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
    drift : Drift or None
        Moves the chunk tokens that are not recomputed.

    Attributes
    ----------
    selected : torch.Tensor or None
        Sorted positions of the recomputed chunk tokens, once they are known.
    rows : torch.Tensor
        Sorted positions of all tokens that are computed; until the selection, of all there are.
    select_seconds : float
        Time spent on choosing them, with the dense layers or the scoring pass that it took.
    """

    def __init__(
        self,
        cache: FusedCache,
        layout: Layout,
        selector: Selector,
        abandoned: Callable[[], bool] = lambda: False,
        drift: Drift | None = None,
    ) -> None:
        self.cache = cache
        self.layout = layout
        self.selector = selector
        self.abandoned = abandoned
        self.drift = drift
        self.selected: torch.Tensor | None = None
        self.select_seconds = 0.0
        self._everything = torch.arange(layout.n_tokens)
        self.rows = self._everything
        self._observer: Observer | None = None
        self._started = time.perf_counter()
        cache.fusion = self

        if isinstance(selector, LayerSelector) and not 0 <= selector.layer < len(cache.layers):
            raise ValueError(
                f"{selector.name} selects at layer {selector.layer}, but the model has layers 0 to "
                f"{len(cache.layers) - 1}."
            )
        if selector.ratio >= 1.0:
            self.take(layout.chunk_positions)
        elif selector.ratio <= 0.0 or not layout.chunks:
            self.take(torch.empty(0, dtype=torch.long))
        elif isinstance(selector, BoundarySelector):
            self.take(selector.select(layout))

    def take(self, selected: torch.Tensor) -> None:
        """Recompute these chunk tokens, given in any order."""
        self.selected = torch.unique(selected.cpu())
        self.rows = (
            self._everything[self.layout.reused :]
            if self.selector.ratio >= 1.0
            else torch.unique(torch.cat([self.selected, self.layout.fresh]))
        )
        self.select_seconds = time.perf_counter() - self._started

    @contextmanager
    def only_fresh(self, observer: Observer) -> Iterator[None]:
        """Meanwhile only the fresh tokens are computed, and the observer sees every attention."""
        rows, drift = self.rows, self.drift
        self.rows, self.drift, self._observer = self.layout.fresh, None, observer
        try:
            yield
        finally:
            self.rows, self.drift, self._observer = rows, drift, None

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
        cached = self.cache.layers[index]
        cached.rows = self.rows
        cached.before_write = (
            partial(self.drift.apply, index, cached, self.rows)
            if self.drift and self.selected is not None
            else None
        )
        args, kwargs = self._narrow(args, kwargs)
        return args, {**kwargs, "attention_mask": Rows(self.rows, self._observer)}

    def _select_at(
        self, layer: nn.Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert isinstance(self.selector, LayerSelector)
        cached = self.cache.layers[index]
        query, key, value = project(layer, args, kwargs)
        stored_key, stored_value = cached.stored()
        self.take(
            self.selector.select(
                self.layout, States(query, key, value), States(None, stored_key, stored_value)
            )
        )
        # This layer's states were computed for every token: the fresh ones are the exact ones.
        cached.write(self._everything, key, value)

    def _narrow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Slice what is still as long as the prompt; hidden states may be narrow already."""
        n_tokens = self.layout.n_tokens
        if len(self.rows) == n_tokens:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = self.rows.to(hidden.device)
        if hidden.shape[1] == n_tokens:
            hidden = hidden[:, rows]
        kwargs = dict(kwargs)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
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

    if getattr(layers, "_a3_hooks_installed", False):  # another engine shares the model
        return
    layers._a3_hooks_installed = True  # type: ignore[assignment]
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
