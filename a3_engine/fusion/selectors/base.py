"""What a selector is: a frozen dataclass that says which chunk tokens are recomputed.

There are four kinds, by what they look at: the layout, one layer's states, the question's
attention, or, block by block, what is kept at all. The engine runs the layers or the scoring pass
that a kind needs, and asks once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, Self

import torch

from a3_engine.fusion.attention_sums import Pool
from a3_engine.fusion.cache import BeforeWrite
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.layout import Layout
from a3_engine.model.masks import LocalGlobal
from a3_engine.model.rotary import Rotation


@dataclass(frozen=True)
class States:
    """One layer's rotated states of all prompt tokens.

    ``query``: ``(1, heads, tokens, head_dim)``; ``key``, ``value``: ``(1, kv_heads, tokens,
    head_dim)``. A stored counterpart has no query. ``lookahead``: queries of a drafted answer,
    ``(1, heads, drafted, head_dim)``, which stand behind the prompt.
    """

    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    lookahead: torch.Tensor | None = None


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


@dataclass(frozen=True)
class BoundarySelector(Selector):
    """Selects by where the chunks stand, before the pass begins."""

    @abstractmethod
    def select(self, layout: Layout) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order."""


@dataclass(frozen=True)
class LayerSelector(Selector):
    """Selects inside the pass, at ``layer``; the layers before it are computed for all tokens.

    As in the released code of A³ and CacheBlend, the ratio is that of all tokens before the
    question: a prefix counts towards the budget, though its tokens are never picked.
    """

    layer: int = 1

    @property
    def drafted(self) -> int:
        """Tokens of the answer to draft on the reused cache first, for their queries."""
        return 0

    def budget(self, layout: Layout) -> int:
        before_question = layout.n_tokens - layout.n_question
        return min(int(before_question * self.ratio), len(layout.chunk_positions))

    @abstractmethod
    def select(self, layout: Layout, fresh: States, stored: States) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order.

        Parameters
        ----------
        fresh : States
            The layer's states computed in this pass, all tokens.
        stored : States
            What the cache held for this layer, rotated into place; fresh tokens hold nothing
            meaningful there.
        """


@dataclass(frozen=True)
class QuestionSelector(Selector):
    """Selects by the question's attention to the loaded keys, before the pass begins.

    The engine runs the fresh tokens alone over the loaded cache and adds up what the question
    attends to. With ``alone`` the question has seen no chunk until then. ``pool`` is that of
    :class:`~a3_engine.fusion.attention_sums.AttentionSums`.
    """

    alone: ClassVar[bool] = False
    pool: ClassVar[Pool] = "mean"

    def layers(self, n_layers: int) -> range:
        """The layers whose attention is wanted; all of them unless a method says otherwise."""
        return range(n_layers)

    def kept_per_layer(self, n_layers: int) -> dict[int, float]:
        """Layers from which on only a share of the picked tokens is computed, with that share.

        In ascending order from 1 on, the shares falling; see :mod:`a3_engine.fusion.layer_pruning`.
        """
        return {}

    def local_global(
        self, layout: Layout, attention: torch.Tensor, n_layers: int
    ) -> tuple[int, LocalGlobal] | None:
        """From which layer on the picked tokens attend to less than everything, and what.

        ``attention`` is that of :meth:`select`. None where they attend to everything.
        """
        return None

    @abstractmethod
    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order.

        Parameters
        ----------
        attention : torch.Tensor
            fp32, shape ``(layers, tokens)``: each wanted layer's attention weights, averaged over
            the heads, and over the question's tokens taken together as ``pool`` says.
        """


@dataclass(frozen=True)
class SparseSelector(Selector):
    """Keeps only some chunk tokens at all, computes those, and decodes on them.

    The engine runs the question over the kept ends of the chunks alone, and the end of every chunk
    over its own chunk, and hands their queries to the selector. The ratio is the share of the
    prompt's tokens that stay; at 1.0 nothing is left out.
    """

    n_local: int = 8

    @abstractmethod
    def layers(self, n_layers: int) -> range:
        """The layers whose queries are wanted."""

    @abstractmethod
    def background(self, layout: Layout) -> torch.Tensor:
        """Sorted positions of chunk tokens that stay in any case."""

    @abstractmethod
    def select(
        self, layout: Layout, question: torch.Tensor, local: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Positions of the chunk tokens that stay, the background among them, in any order.

        Parameters
        ----------
        question : torch.Tensor
            Mean query of the question, ``(layers, heads, head_dim)``.
        local : torch.Tensor
            Mean query of each chunk's last ``n_local`` tokens, ``(layers, chunks, heads,
            head_dim)``. All queries are rotated to the prompt's last position.
        keys : torch.Tensor
            The loaded keys, ``(layers, kv_heads, tokens, head_dim)``, rotated into place.
        """
