"""The fusion pass: the model's own forward, narrowed to the rows that are computed.

`FusionPass` is asked before every decoder layer (`model/hooks.py`). It slices the hidden states to
the current rows, hands the layer their positions as an exact mask, and lets the layer's `update` of
the cache write the rows' keys and values over the loaded ones. No model code is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from a3_engine.devices import send
from a3_engine.fusion.attention_sums import Pool
from a3_engine.fusion.cache import BeforeWrite, FusedCache, FusedLayer
from a3_engine.fusion.layer_pruning import LayerPruning
from a3_engine.layout import Layout
from a3_engine.model.attention import capture
from a3_engine.model.hooks import Args, Kwargs
from a3_engine.model.latent import expanded
from a3_engine.model.masks import LocalGlobal, Observer, RowMask

# What a layer is called with that has a part for each row, beside its positional arguments.
SLICED = {"hidden_states", "per_layer_input", "position_embeddings"}


class Abandoned(Exception):
    """Nobody waits for this request any more; its computation stops.

    Raised in `FusionPass.before_layer`, deep inside the model's forward, which only an exception
    leaves early; caught in `request.py`, which reports the request as abandoned.
    """


@dataclass(frozen=True)
class States:
    """One layer's rotated states of all prompt tokens.

    ``query``: ``(1, heads, tokens, head_dim)``; ``key``, ``value``: ``(1, kv_heads, tokens,
    head_dim)``. A stored counterpart has no query.
    """

    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor


class SelectAt(NamedTuple):
    """A selection inside the pass: asked once, with this layer's computed and stored states."""

    layer: int
    select: Callable[[Layout, States, States], torch.Tensor]


class Pruning(NamedTuple):
    """For some layers the share of the selected tokens kept from there on; see `LayerPruning`."""

    kept_per_layer: Mapping[int, float]
    pool: Pool


class FusionPass:
    """One request's walk through the layers.

    Parameters
    ----------
    cache : FusedCache
        Loaded, every layer pending.
    layout : Layout
        Where the prompt's parts stand.
    abandoned : callable
        Asked before every layer; true stops the pass with :class:`Abandoned`.
    before_write : callable or None
        Called before a layer's rows are written; see `BeforeWrite`.
    observer : callable or None
        Sees every attention of the pass; see :class:`~a3_engine.model.masks.RowMask`.

    Attributes
    ----------
    selected : torch.Tensor or None
        Sorted positions of the recomputed chunk tokens, once they are known.
    rows : torch.Tensor
        Sorted positions of all tokens that are computed; until the selection, of all there are.
        They may become fewer from layer to layer.
    pruning : LayerPruning or None
        What makes them fewer, once the selection is known.
    local_global : (int, LocalGlobal) or None
        From which layer on the rows see less than everything, and what; not in layers with a
        sliding window of their own.
    select_at : SelectAt or None
        What selects inside the pass, where nothing is selected before it.
    last_token_only : bool
        Whether the forward's caller wants the last token's logits alone: the last layer then
        computes of the other rows what the cache keeps, their keys and values.
    selected_at : float
        When they were known, by ``perf_counter``.
    select_seconds : float
        Time spent on choosing them, with the dense layers or the scoring pass that it took.
    """

    def __init__(
        self,
        cache: FusedCache,
        layout: Layout,
        abandoned: Callable[[], bool] = lambda: False,
        before_write: BeforeWrite | None = None,
        observer: Observer | None = None,
    ) -> None:
        # The cache holds the pass, and not the pass the cache: in a circle, its memory would wait
        # for Python's collector.
        self._sliding = [
            layer.is_sliding if layer.shape.attends else None for layer in cache.layers
        ]
        self._home = cache.layers[0].device
        self.layout = layout = layout.on(self._home)
        self.abandoned = abandoned
        self.observer = observer
        self.select_at: SelectAt | None = None
        self._before_write = before_write
        self.selected: torch.Tensor | None = None
        self.pruning: LayerPruning | None = None
        self.local_global: tuple[int, LocalGlobal] | None = None
        self.last_token_only = False
        self.selected_at = self.select_seconds = 0.0
        self._key_positions = cache.positions
        if cache.positions is None:
            self._everything = torch.arange(layout.n_tokens, device=self._home)
        else:
            self._key_positions = self._everything = send(cache.positions, self._home)
        self.rows = self._everything
        self._given = self._everything  # the positions of what the forward was called with
        # Of the current rows, by whether they see less than all.
        self._masks: dict[bool, RowMask] = {}
        # What the forward hands to every layer, cut to the current rows once.
        self._cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._started = time.perf_counter()
        cache.fusion = self

    def recompute(
        self,
        selected: torch.Tensor,
        local_global: tuple[int, LocalGlobal] | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        """Recompute these chunk tokens, each given once, in any order.

        From a layer on they may see less than everything before them, or become fewer.
        """
        self.local_global = local_global
        # What is selected and what is fresh never meet, so that their number is known without
        # asking the device.
        self.selected = send(selected, self._home).sort().values
        self._go_on_with(torch.cat([self.selected, self.layout.fresh]).sort().values)
        if pruning is not None:
            self.pruning = LayerPruning(
                pruning.kept_per_layer, self._sliding, self.layout, self.selected, pruning.pool
            )
        self._settled()

    def recompute_all(self) -> None:
        """Recompute every token that no earlier request left."""
        self.selected = self.layout.chunk_positions
        self._go_on_with(self._everything[self.layout.reused :])
        self._settled()

    def _settled(self) -> None:
        self.selected_at = time.perf_counter()
        self.select_seconds = self.selected_at - self._started

    def computed(self) -> torch.Tensor | None:
        """Sorted positions of the computed tokens, once they are known."""
        return None if self.selected is None else self.rows

    def _go_on_with(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._masks.clear()
        self._cut.clear()

    @contextmanager
    def only_fresh(self, observer: Observer | None = None) -> Iterator[None]:
        """Meanwhile only the fresh tokens are computed, and an observer sees every attention."""
        saved = ("selected", "pruning", "local_global", "_before_write", "observer")
        before, rows = {name: getattr(self, name) for name in saved}, self.rows
        self._go_on_with(self.layout.fresh)
        self.selected = self.layout.fresh[:0]
        self.pruning = self.local_global = self._before_write = None
        self.observer = observer
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            self._go_on_with(rows)

    def before_layer(
        self,
        cache: FusedCache,
        layer: nn.Module,
        index: int,
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Args, Kwargs]:
        """Narrow a layer's input to the rows that it computes."""
        if self.abandoned():
            raise Abandoned
        if index == 0:
            n_given = (args[0] if args else kwargs["hidden_states"]).shape[-2]
            self._given = (
                torch.arange(n_given, device=self._home)
                if n_given == self.layout.n_tokens
                else self.rows
            )
        if self.selected is None and self.select_at and index == self.select_at.layer:
            self._select(self.select_at, cache.layers[index], layer, args, kwargs)
        if self.pruning is not None and self.pruning.prunes_at(index):
            before, left = self.rows, self.pruning.pick(index)
            self._go_on_with(torch.cat([left, self.layout.fresh]).sort().values)
            args, kwargs = self._sliced(args, kwargs, before)
        if index >= len(cache.layers):
            return self._sharing(args, kwargs)
        cached, mask = cache.layers[index], self._shared_mask(index)
        cached.rows = mask.slots
        cached.before_write = (
            partial(self._before_write, index, cached, self.rows)
            if self._before_write and self.selected is not None and cached.shape.attends
            else None
        )
        args, kwargs = self._sliced(args, kwargs, self._given)
        last = index == len(cache.layers) - 1 and cached.shape.attends
        if last and self.last_token_only and self.observer is None:
            cached.complete(*capture(layer, args, kwargs).kept)
            before = self.rows
            self._go_on_with(self.rows[-1:])
            mask = RowMask(self.rows, self._key_positions)
            args, kwargs = self._sliced(args, kwargs, before)
        return args, {**kwargs, "attention_mask": mask}

    def _sharing(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The input of a layer that attends to the keys and values of one below.

        Its model may have cut it to the last tokens by itself.
        """
        args, kwargs = self._sliced(args, kwargs, self._given)
        n_rows = (args[0] if args else kwargs["hidden_states"]).shape[-2]
        return args, {**kwargs, "attention_mask": RowMask(self.rows[-n_rows:], self._key_positions)}

    def _shared_mask(self, index: int) -> RowMask:
        """The current rows as a mask, made once for all layers where they see the same."""
        first, local_global = self.local_global or (0, None)
        if self._sliding[index] or index < first:
            local_global = None
        if (local_global is not None) not in self._masks:
            self._masks[local_global is not None] = RowMask(
                self.rows, self._key_positions, self._observe, local_global
            )
        return self._masks[local_global is not None]

    def _observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        if self.observer is not None:
            self.observer(layer, query, key, rows, scaling)
        if self.pruning is not None:
            self.pruning.observe(layer, query, key, rows, scaling)

    def _sliced(self, args: Args, kwargs: Kwargs, given: torch.Tensor) -> tuple[Args, Kwargs]:
        """The current rows of a layer's input, where it has those that are ``given``.

        Some of it may be narrow already.
        """
        if len(self.rows) == len(given):
            return args, kwargs

        def of(states: Any, *, again: bool = False) -> Any:
            if isinstance(states, tuple):  # tables of the rotation, the same in many layers
                return tuple(of(table, again=True) for table in states)
            if not torch.is_tensor(states) or states.shape[-2] != len(given):
                return states
            if again and id(states) in self._cut:
                return self._cut[id(states)][1]
            among = torch.searchsorted(given, self.rows).to(states.device)
            cut = states.index_select(-2, among)
            if again:
                self._cut[id(states)] = states, cut  # holds it, so that no other gets its number
            return cut

        args, kwargs = tuple(of(each) for each in args), dict(kwargs)
        for name in SLICED & kwargs.keys():
            kwargs[name] = of(kwargs[name])
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = of(positions[..., None])[..., 0]
        return args, kwargs

    def _select(
        self, at: SelectAt, cached: FusedLayer, layer: nn.Module, args: Args, kwargs: Kwargs
    ) -> None:
        captured = capture(layer, args, kwargs)
        stored = States(None, *expanded(layer, *cached.stored()))
        self.recompute(at.select(self.layout, States(*captured.states), stored))
        # This layer's states were computed for every token: the fresh ones are the exact ones.
        cached.write(self._everything, *captured.kept)
