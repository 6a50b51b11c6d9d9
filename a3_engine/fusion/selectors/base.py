"""What a selector is: a frozen dataclass that says which chunk tokens are recomputed.

It prepares its own pass: it runs what it looks at, asks its `select` once, and hands the result to
the `FusionPass`. The four kinds, by what they look at, are in `kinds.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, NamedTuple, Self

import torch
from transformers import PreTrainedModel

from a3_engine.fusion.cache import BeforeWrite, FusedCache
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.fusion.fusion_pass import FusionPass
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout
from a3_engine.model.masks import Observer
from a3_engine.model.rotary import Rotation


def _no_local_queries(n_local: int, layers: range) -> torch.Tensor:
    raise AssertionError("local queries were not asked for")


@dataclass(frozen=True)
class Run:
    """One request, as a selector prepares its pass.

    Parameters
    ----------
    model, rotation
        What computes, and how it turns keys.
    cache : FusedCache
        Loaded, every layer pending.
    ids : sequence of int
        The prompt.
    room : int
        Slots for the answer.
    abandoned, observer
        See :class:`~a3_engine.fusion.fusion_pass.FusionPass`.
    local_queries : callable
        See :meth:`~a3_engine.fusion.sparse.LocalQueries.get`: takes ``n_local`` and the layers, and
        gives the chunks' local queries, ``(chunks, layers, heads, head_dim)``.
    """

    model: PreTrainedModel
    rotation: Rotation
    cache: FusedCache
    layout: Layout
    ids: Sequence[int]
    room: int = 0
    abandoned: Callable[[], bool] = lambda: False
    observer: Observer | None = None
    local_queries: Callable[[int, range], torch.Tensor] = _no_local_queries


class Prepared(NamedTuple):
    """A cache whose next forward is the fusion pass, and that pass."""

    cache: FusedCache
    fusion: FusionPass


@dataclass(frozen=True)
class Selector(ABC):
    """Base of all selectors.

    Parameters
    ----------
    ratio : float
        Share of tokens to recompute, 0 to 1. At 1.0 every token is computed, which is a full
        prefill; at 0.0 only the fresh tokens are, which is full reuse.
    correction : KVCorrection or None
        Also move the chunk tokens that are not recomputed.
    """

    name: ClassVar[str]
    # A method that computes everything reads no chunk from the store.
    uses_chunks: ClassVar[bool] = True
    # One that leaves tokens out makes a cache that serves its own request alone.
    leaves_out: ClassVar[bool] = False
    ratio: float = 0.15
    correction: KVCorrection | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, Real) or not 0.0 <= self.ratio <= 1.0:
            raise ValueError(
                f"The recompute ratio is a number between 0 and 1, not {self.ratio!r}; "
                "0.15 recomputes 15 % of the tokens."
            )

    def at(self, ratio: float) -> Self:
        """The same method at another ratio."""
        return replace(self, ratio=ratio)

    def budget(self, layout: Layout) -> int:
        """Number of chunk tokens to recompute."""
        return int(len(layout.chunk_positions) * self.ratio)

    def follow_head(
        self, start: int, chunk: ChunkKV, head: ChunkKV, cache: FusedCache, rotation: Rotation
    ) -> None:
        """Correct the rest of a prompt's first chunk by its head, where anything is corrected.

        At the ratios 0 and 1 nothing is; see :meth:`KVCorrection.follow_head`.
        """
        if self.correction is not None and 0.0 < self.ratio < 1.0:
            self.correction.follow_head(start, chunk, head, cache, rotation)

    def before_write(
        self, layout: Layout, rotation: Rotation, devices: Sequence[torch.device]
    ) -> BeforeWrite | None:
        """What is done to a layer before its computed rows are written over the stored ones.

        Parameters
        ----------
        devices : sequence of torch.device
            Where each layer is.
        """
        return (
            Corrector(self.correction, layout, rotation, devices).apply if self.correction else None
        )

    @torch.inference_mode()
    def prepare(self, run: Run) -> Prepared:
        """Run what the method looks at, and hang the pass on the request's cache.

        The prepared cache is a smaller one where the method leaves tokens out.
        """
        if 0.0 < self.ratio < 1.0 and run.layout.chunks:
            return self._prepare(run)
        fusion = self._start(run, run.cache)
        if self.ratio >= 1.0:
            fusion.recompute_all()
        else:
            fusion.recompute(run.layout.fresh[:0])
        return Prepared(run.cache, fusion)

    @abstractmethod
    def _prepare(self, run: Run) -> Prepared:
        """The same for a prompt with chunks, some of whose tokens are recomputed."""

    def _start(self, run: Run, cache: FusedCache) -> FusionPass:
        """A pass over a cache that knows of no selection yet."""
        before_write = self.before_write(run.layout, run.rotation, cache.devices)
        return FusionPass(cache, run.layout, run.abandoned, before_write, run.observer)
