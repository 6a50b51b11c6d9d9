"""The fusion pass: the model's own forward, narrowed to the rows that are computed.

`FusionPass` hooks in before every decoder layer. It slices the hidden states to the current rows,
hands the layer their positions as an exact mask, and lets the layer's `update` of the cache write
the rows' keys and values over the loaded ones. No model code is copied.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a3_engine.devices import send
from a3_engine.fusion.cache import BeforeWrite, FusedCache, FusedLayer
from a3_engine.fusion.layer_pruning import LayerPruning
from a3_engine.fusion.selectors.base import (
    BoundarySelector,
    LayerSelector,
    QuestionSelector,
    Selector,
    States,
)
from a3_engine.layout import Layout
from a3_engine.model.attention import capture, install
from a3_engine.model.batch_cache import BatchCache
from a3_engine.model.cache_argument import cache_in, with_cache
from a3_engine.model.latent import expand_each, expanded, is_latent
from a3_engine.model.masks import LocalGlobal, Observer, RowMask

# What a layer is called with that has a part for each row, beside its positional arguments.
SLICED = {"hidden_states", "per_layer_input", "position_embeddings"}


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
    lookahead : torch.Tensor or None
        Queries of a drafted answer at the selecting layer, ``(1, heads, drafted, head_dim)``.
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
        selector: Selector,
        abandoned: Callable[[], bool] = lambda: False,
        before_write: BeforeWrite | None = None,
        observer: Observer | None = None,
    ) -> None:
        # The cache holds the pass, and not the pass the cache: in a circle, its memory would wait
        # for Python's collector.
        self._sliding = [layer.is_sliding for layer in cache.layers]
        self._home = cache.layers[0].device
        self.layout = layout = layout.on(self._home)
        self.selector = selector
        self.abandoned = abandoned
        self.observer = observer
        self.lookahead: torch.Tensor | None = None
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
        self._masks: dict[
            bool, RowMask
        ] = {}  # of the current rows, by whether they see less than all
        # What the forward hands to every layer, cut to the current rows once.
        self._cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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

    def take(
        self, selected: torch.Tensor, local_global: tuple[int, LocalGlobal] | None = None
    ) -> None:
        """Recompute these chunk tokens, each given once, in any order.

        From a layer on they may see less than everything before them.
        """
        self.local_global = local_global
        # What is picked and what is fresh never meet, so that their number is known without asking
        # the device.
        self.selected = send(selected, self._home).sort().values
        self._go_on_with(
            self._everything[self.layout.reused :]
            if self.selector.ratio >= 1.0
            else torch.cat([self.selected, self.layout.fresh]).sort().values
        )
        if isinstance(self.selector, QuestionSelector) and 0.0 < self.selector.ratio < 1.0:
            kept_per_layer = self.selector.kept_per_layer(len(self._sliding))
            self.pruning = LayerPruning(
                kept_per_layer, self._sliding, self.layout, self.selected, self.selector.pool
            )
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
        before = (
            self.rows,
            self.selected,
            self.pruning,
            self.local_global,
            self._before_write,
            self.observer,
        )
        self._go_on_with(self.layout.fresh)
        self.selected = self.layout.fresh[:0]
        self.pruning = self.local_global = self._before_write = None
        self.observer = observer
        try:
            yield
        finally:
            (
                rows,
                self.selected,
                self.pruning,
                self.local_global,
                self._before_write,
                self.observer,
            ) = before
            self._go_on_with(rows)

    def before_layer(
        self,
        cache: FusedCache,
        layer: nn.Module,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Narrow a layer's input to the rows that it computes; the layer's forward pre-hook."""
        if self.abandoned():
            raise Abandoned
        if index == 0:
            n_given = (args[0] if args else kwargs["hidden_states"]).shape[-2]
            self._given = (
                torch.arange(n_given, device=self._home)
                if n_given == self.layout.n_tokens
                else self.rows
            )
        if (
            self.selected is None
            and isinstance(self.selector, LayerSelector)
            and index == self.selector.layer
        ):
            self._select_at(cache.layers[index], layer, args, kwargs)
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
            if self._before_write and self.selected is not None
            else None
        )
        args, kwargs = self._sliced(args, kwargs, self._given)
        if self.last_token_only and index == len(cache.layers) - 1 and self.observer is None:
            cached.complete(*capture(layer, args, kwargs).kept)
            before = self.rows
            self._go_on_with(self.rows[-1:])
            mask = RowMask(self.rows, self._key_positions)
            args, kwargs = self._sliced(args, kwargs, before)
        return args, {**kwargs, "attention_mask": mask}

    def _sharing(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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

    def _sliced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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

    def _select_at(
        self,
        cached: FusedLayer,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        assert isinstance(self.selector, LayerSelector)
        computed = capture(layer, args, kwargs)
        self.take(
            self.selector.select(
                self.layout,
                States(*computed.states, self.lookahead),
                States(None, *expanded(layer, *cached.stored())),
            )
        )
        # This layer's states were computed for every token: the fresh ones are the exact ones.
        cached.write(self._everything, *computed.kept)


def arguments(module: nn.Module, ids: torch.Tensor, cache: FusedCache | Cache) -> dict[str, Any]:
    """What a forward over prompts is called with: their tokens, or of those the ones computed.

    Parameters
    ----------
    ids : torch.Tensor
        Shape ``(prompts, tokens)``.
    cache : Cache
        Where it has a pass that knows its rows by now, the others are not even embedded.
    """
    given = {"input_ids": ids, **with_cache(module, cache)}
    if not isinstance(cache, FusedCache) or cache.fusion is None or not cache.layers[0].pending:
        return given
    computed = cache.fusion.computed()
    if computed is None:
        return given
    rows = send(computed, ids.device)
    return {
        **given,
        "input_ids": ids.index_select(1, rows),
        "position_ids": rows[None],
        # transformers leaves a mask of four dimensions alone; the layers' hooks exchange it.
        "attention_mask": torch.empty(1, 1, 1, 1, device=ids.device),
    }


def run_pass(decoder: PreTrainedModel, ids: Sequence[Sequence[int]], cache: FusedCache) -> None:
    """The decoder's forward over prompts, narrowed by their cache's pass, without logits."""
    device = decoder.get_input_embeddings().weight.device
    decoder(**arguments(decoder, send(torch.tensor(ids), device), cache))


def install_hooks(model: PreTrainedModel) -> None:
    """Let caches of ours steer a model's decoder layers; any other call passes untouched."""
    layers = model.get_decoder().layers
    owner = weakref.ref(model)  # the layers would hold their model, in a circle

    def hook_for(index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = cache_in(kwargs)
            if index == 0 and isinstance(cache, (BatchCache, FusedCache)):
                whole = owner()
                assert whole is not None
                install(whole)  # its attention may have been changed since
            if isinstance(cache, BatchCache):
                return args, {**kwargs, "attention_mask": cache.mask}
            if not isinstance(cache, FusedCache):
                return None
            if index == 0:
                cache.passing = cache.layers[0].pending
            if cache.fusion is not None and cache.passing:
                return cache.fusion.before_layer(cache, layer, index, args, kwargs)
            if cache.observer is not None and index < len(cache.layers):
                hidden = args[0] if args else kwargs["hidden_states"]
                slots = cache.layers[index].length + torch.arange(hidden.shape[1])
                return args, {**kwargs, "attention_mask": RowMask(slots, observer=cache.observer)}
            return None

        return hook

    if getattr(layers, "_a3_hooks_installed", False):  # another engine shares the model
        return
    install(model)
    layers._a3_hooks_installed = True  # type: ignore[assignment]
    for index, layer in enumerate(layers):
        if is_latent(layer):
            expand_each(layer)
        layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
