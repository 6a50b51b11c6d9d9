"""Full prefill: the model's ordinary forward over the same token ids, the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a3_engine.fusion.selectors.base import Prepared, Run, Selector


@dataclass(frozen=True)
class FullPrefill(Selector):
    """Uses no cached chunk; the engine serves it by transformers' ordinary prefill.

    With a compression it is a fusion pass over every token.
    """

    name: ClassVar[str] = "full_prefill"
    uses_chunks: ClassVar[bool] = False
    ratio: float = 1.0

    def _prepare(self, run: Run) -> Prepared:
        fusion = self._start(run, run.cache)
        fusion.recompute_all()
        return Prepared(run.cache, fusion)
