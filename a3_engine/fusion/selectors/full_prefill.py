"""Full prefill: the model's ordinary forward over the same token ids, the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a3_engine.fusion.selectors.base import Selector


@dataclass(frozen=True)
class FullPrefill(Selector):
    """Uses no cached chunk; the engine serves it by transformers' ordinary prefill."""

    name: ClassVar[str] = "full_prefill"
    ratio: float = 1.0
