"""What a selector is: a frozen dataclass that says which chunk tokens are recomputed.

There are three kinds, by what they look at. The fusion pass runs the dense layers or the scoring
pass that a kind needs, and asks once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch

from a3_engine.fusion.drift import DriftRepair
from a3_engine.fusion.layout import Layout


@dataclass(frozen=True)
class States:
    """One layer's rotated states of all prompt tokens.

    ``query``: ``(1, heads, tokens, head_dim)``; ``key``, ``value``: ``(1, kv_heads, tokens,
    head_dim)``. A stored counterpart has no query.
    """

    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Selector(ABC):
    """Base of all selectors.

    Parameters
    ----------
    ratio : float
        Share of tokens to recompute, 0 to 1. At 1.0 every token is computed, which is a full
        prefill; at 0.0 only the fresh tokens are, which is full reuse.
    repair : DriftRepair or None
        Also move the chunk tokens that are not recomputed.
    """

    name: ClassVar[str]
    ratio: float = 0.15
    repair: DriftRepair | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, Real) or not 0.0 <= self.ratio <= 1.0:
            raise ValueError(
                f"The recompute ratio is a number between 0 and 1, not {self.ratio!r}; "
                "0.15 recomputes 15 % of the tokens."
            )

    def budget(self, layout: Layout) -> int:
        """Number of chunk tokens to recompute."""
        return int(len(layout.chunk_positions) * self.ratio)


@dataclass(frozen=True)
class BoundarySelector(Selector):
    """Selects by where the chunks stand, before the pass begins."""

    @abstractmethod
    def select(self, layout: Layout) -> torch.Tensor:
        """Positions of chunk tokens, in any order."""


@dataclass(frozen=True)
class LayerSelector(Selector):
    """Selects inside the pass, at ``layer``; the layers before it are computed for all tokens.

    As in the released code of A³ and CacheBlend, the ratio is that of all tokens before the
    question: a prefix counts towards the budget, though its tokens are never picked.
    """

    layer: int = 1

    def budget(self, layout: Layout) -> int:
        before_question = layout.n_tokens - layout.n_question
        return min(int(before_question * self.ratio), len(layout.chunk_positions))

    @abstractmethod
    def select(self, layout: Layout, fresh: States, stored: States) -> torch.Tensor:
        """Positions of chunk tokens, in any order.

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
    attends to.
    """

    def layers(self, n_layers: int) -> range:
        """The layers whose attention is wanted; all of them unless a method says otherwise."""
        return range(n_layers)

    @abstractmethod
    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        """Positions of chunk tokens, in any order.

        Parameters
        ----------
        attention : torch.Tensor
            fp32, shape ``(layers, tokens)``: each wanted layer's attention weights, averaged over
            the question's tokens and the heads.
        """


def top_candidates(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` candidate positions with the highest scores.

    Parameters
    ----------
    scores : torch.Tensor
        One score a position of the prompt, shape ``(tokens,)``.
    candidates : torch.Tensor
        Positions that may be picked.
    """
    candidates = candidates.to(scores.device)
    best = torch.topk(scores[candidates], min(k, len(candidates))).indices
    return candidates[best]
