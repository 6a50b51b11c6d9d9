"""Our own method: recompute what the question attends to, and mend the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from a3_engine.devices import send
from a3_engine.fusion.attention_sums import Pool
from a3_engine.fusion.correction import KVCorrection
from a3_engine.fusion.selectors.kinds import QuestionSelector
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout
from a3_engine.model.masks import LocalGlobal

# Attention to a chunk's first token counts for this much more; START_TOKENS later, for a third.
START_WEIGHT, START_TOKENS = 2.0, 8.0
WINDOW = 64  # tokens
SHARED = 2  # times the picked ones are attended to by all
LEAST_SHARE = 1 / 3  # of the layers; what happens in these, all others see


@dataclass(frozen=True)
class Mend(QuestionSelector):
    """Question attention over the lower layers, fewer rows above, and KV correction of the rest.

    A token counts by the most that any token of the question attends to it, the first ones of a
    chunk for more than that. Tokens whose stored KV is exact already, those of a first chunk that
    stands just after what it was computed after, are not picked.

    Parameters
    ----------
    ratio : float
        Share of the chunk tokens to recompute.
    least : int
        Tokens to recompute at least, where there are as many: in short prompts each chunk is a
        large part, and a small share of them is few tokens to learn from. It counts for the
        method's own ratio alone; one that is asked for is meant as it is.
    correction : KVCorrection or None
        How the other chunk tokens are moved; see :mod:`a3_engine.fusion.correction`.
    depth : float
        Share of the layers, from the first, whose attention is looked at; the scoring pass ends
        there.
    narrow : tuple of (float, float)
        From a share of the depth on, the share of the picked tokens that is still computed; see
        :mod:`a3_engine.fusion.layer_pruning`.
    long_tokens : int
        Up to this number of chunk tokens, the computed ones attend to everything before them in all
        layers. Beyond, only in as many of the lower layers as cost no more than that, though
        in a third of them at least; above, to as many tokens again as are picked, those that the
        question attends to next, to each other, and to the 64 tokens up to themselves.
    """

    name: ClassVar[str] = "mend"
    pool: ClassVar[Pool] = "max"
    ratio: float = 0.05
    # Chunks that were computed after a stand-in have little left to be moved.
    correction: KVCorrection | None = field(
        default_factory=lambda: KVCorrection(strength=0.3, head_strength=0.8)
    )
    least: int = 128
    depth: float = 1 / 3
    narrow: tuple[tuple[float, float], ...] = ((0.5, 0.7), (0.6, 0.45), (0.8, 0.15))
    long_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.depth <= 1.0:
            raise ValueError(f"The depth of scoring lies above 0 and up to 1, not at {self.depth}.")
        depths, shares = [at for at, _ in self.narrow], [share for _, share in self.narrow]
        if not (
            all(0.0 < at < 1.0 for at in depths)
            and all(0.0 <= share <= 1.0 for share in shares)
            and depths == sorted(set(depths))
            and shares == sorted(shares, reverse=True)
        ):
            raise ValueError(
                "narrow takes pairs of a depth between 0 and 1, each below the next, and a share "
                f"from 0 to 1, none above the one before, not {self.narrow}."
            )
        if self.least < 0:
            raise ValueError(f"least counts tokens, so not {self.least}.")
        if self.long_tokens < 0:
            raise ValueError(f"long_tokens counts tokens, so not {self.long_tokens}.")

    def at(self, ratio: float) -> Mend:
        return replace(self, ratio=ratio, least=0)

    def budget(self, layout: Layout) -> int:
        return max(super().budget(layout), min(self.least, len(layout.inexact_positions)))

    def layers(self, n_layers: int) -> range:
        return range(math.ceil(n_layers * self.depth))

    def kept_per_layer(self, n_layers: int) -> dict[int, float]:
        return {math.ceil(n_layers * at): share for at, share in self.narrow}

    def local_from(self, n_layers: int, n_chunk_tokens: int) -> int | None:
        """The layer from which on the picked tokens attend to less; None where nowhere."""
        if n_chunk_tokens <= self.long_tokens:
            return None
        # Scores of rows over keys grow with the square of the tokens.
        return math.ceil(n_layers * max((self.long_tokens / n_chunk_tokens) ** 2, LEAST_SHARE))

    def local_global(
        self, layout: Layout, attention: torch.Tensor, n_layers: int
    ) -> tuple[int, LocalGlobal] | None:
        first = self.local_from(n_layers, len(layout.chunk_positions))
        if first is None:
            return None
        # Chunk tokens that are exact already are attended to as well, though never picked.
        scores, picked = self.scores(layout, attention), self.select(layout, attention)
        best = top_candidates(scores, layout.chunk_positions, SHARED * self.budget(layout))
        shared = torch.cat([picked, best])
        return first, LocalGlobal(layout.with_chunk_tokens(shared), WINDOW, layout.chunks[-1].stop)

    def scores(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        """How much each token counts, ``(tokens,)``; the attention is that of :meth:`select`."""
        # What stands before a chunk moves its first tokens most: alone, they see nothing.
        weights = torch.ones(layout.n_tokens)
        for span in layout.chunks:
            offsets = torch.arange(span.stop - span.start)
            weights[span.start : span.stop] += START_WEIGHT * torch.exp(-offsets / START_TOKENS)
        return attention.mean(0) * send(weights, attention.device)

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        scores = self.scores(layout, attention)
        return top_candidates(scores, layout.inexact_positions, self.budget(layout))
