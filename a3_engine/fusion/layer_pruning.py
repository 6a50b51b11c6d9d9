"""Fewer rows in the upper layers.

What a recomputed token's upper layers give is read by the question and the answer alone, and by
few tokens above them; the lower layers feed all that stands on top. So a token whose keys the
question hardly attends to may keep its stored ones from some layer on. Which those are the pass
itself shows, in the layer just below: the last one that attends to everything, since one with a
sliding window sees the question's neighbours alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from a3_engine.fusion.attention_sums import AttentionSums, Pool
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout
from a3_engine.model.masks import RowMask


class LayerPruning:
    """The picked tokens that a pass goes on with, stage by stage.

    Parameters
    ----------
    kept_per_layer : mapping of int to float
        For some layers, in ascending order from 1 on, the share of the picked tokens that is
        computed from there on. What lies beyond the last layer is never reached.
    sliding : sequence of bool or None
        Which layers attend within a sliding window; None for those that do not attend.
    layout : Layout
    selected : torch.Tensor
        Sorted positions of the picked tokens.
    pool : str
        See :class:`~a3_engine.fusion.attention_sums.AttentionSums`.

    Attributes
    ----------
    survivors : dict of int to torch.Tensor
        Sorted positions of those computed from a layer on, for every stage that was reached.
    """

    def __init__(
        self,
        kept_per_layer: Mapping[int, float],
        sliding: Sequence[bool | None],
        layout: Layout,
        selected: torch.Tensor,
        pool: Pool,
    ) -> None:
        self._selected = selected
        self._shown_by = {
            stage: max(below, key=lambda at: (not sliding[at], at))
            for stage in kept_per_layer
            if stage < len(sliding)
            and (below := [at for at in range(stage) if sliding[at] is not None])
        }
        self._kept_per_layer = {stage: kept_per_layer[stage] for stage in self._shown_by}
        self._sums = AttentionSums(layout, set(self._shown_by.values()), pool)
        self.survivors: dict[int, torch.Tensor] = {}

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        """See every attention of the pass."""
        self._sums.observe(layer, query, key, rows, scaling)

    def prunes_at(self, layer: int) -> bool:
        """Whether fewer tokens are computed from this layer on."""
        return layer in self._kept_per_layer

    def pick(self, layer: int) -> torch.Tensor:
        """Sorted positions of the tokens that go on from this layer."""
        before = next(reversed(self.survivors.values()), self._selected)
        attended = self._sums.of(self._shown_by[layer])
        n_left = round(self._kept_per_layer[layer] * len(self._selected))
        self.survivors[layer] = top_candidates(attended, before, n_left).sort().values
        return self.survivors[layer]
