"""CacheBlend: the tokens whose values context changed most (arXiv 2405.16444)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.fusion_pass import States
from a3_engine.fusion.selectors.kinds import LayerSelector
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout


@dataclass(frozen=True)
class CacheBlend(LayerSelector):
    """Difference between fresh and stored values at one early layer.

    The whole question is recomputed and the mask is exact. The released code recomputes only the
    question's last token in some of its examples, and lets recomputed tokens see later ones; both
    are known to cost quality.

    Parameters
    ----------
    ratio : float
        Share of the tokens before the question; 0.16 is the default of the released code.
    layer : int
        Layer at which values are compared; the layers before it run for all tokens.
    """

    name: ClassVar[str] = "cacheblend"
    ratio: float = 0.16

    def select(self, layout: Layout, fresh: States, stored: States) -> torch.Tensor:
        difference = (fresh.value[0].float() - stored.value[0].float()).square().sum(dim=(0, 2))
        return top_candidates(difference, layout.chunk_positions, self.budget(layout))
