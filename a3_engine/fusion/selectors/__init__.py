"""The selectors by name. A new method is one file in this folder and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a3_engine.fusion.selectors.a3 import A3
from a3_engine.fusion.selectors.base import Selector
from a3_engine.fusion.selectors.cacheblend import CacheBlend
from a3_engine.fusion.selectors.epic import Epic
from a3_engine.fusion.selectors.full_prefill import FullPrefill
from a3_engine.fusion.selectors.full_reuse import FullReuse
from a3_engine.fusion.selectors.fusion_rag import FusionRAG
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.fusion.selectors.question_attention import QuestionAttention
from a3_engine.fusion.selectors.random import Random
from a3_engine.fusion.selectors.samkv import SamKV

SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        A3,
        CacheBlend,
        Epic,
        FullPrefill,
        FullReuse,
        FusionRAG,
        Mend,
        QuestionAttention,
        Random,
        SamKV,
    )
}
DEFAULT = Mend.name
BALANCED = "balanced"
# What they stand for, in the order of their cost; figures in docs/results.md.
QUALITIES: dict[str, Selector] = {
    "fast": FullReuse(),
    BALANCED: Mend(),
    "exact": FullPrefill(),
}


def make_selector(selector: str | Selector, ratio: float | None = None) -> Selector:
    """A selector by name, or the given one, with another ratio if one is given.

    Raises
    ------
    ValueError
        No selector has this name.
    """
    if isinstance(selector, str):
        if selector not in SELECTORS:
            raise ValueError(
                f"There is no selector {selector!r}; choose one of {', '.join(sorted(SELECTORS))}."
            )
        selector = SELECTORS[selector]()
    if not isinstance(selector, Selector):
        raise TypeError(f"A selector is a name or a Selector, not {type(selector).__name__}.")
    return selector if ratio is None else selector.at(ratio)


def choose_selector(
    selector: str | Selector | None,
    ratio: float | None,
    quality: str | None,
    default: str | Selector = DEFAULT,
) -> Selector:
    """The selector that is asked for, by name and ratio or by quality; the default for neither.

    Raises
    ------
    ValueError
        There is no such selector or quality, or both are given.
    """
    if quality is None:
        return make_selector(default if selector is None else selector, ratio)
    if selector is not None or ratio is not None:
        raise ValueError("quality stands for a selector and its ratio: give it, or these.")
    if quality not in QUALITIES:
        raise ValueError(f"There is no quality {quality!r}; choose one of {', '.join(QUALITIES)}.")
    return QUALITIES[quality]


def with_call(settings: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a call's own on top, whose quality replaces selector and ratio, or these it."""
    if call.get("quality") is not None:
        settings = {**settings, "selector": None, "ratio": None}
    elif call.get("selector") is not None or call.get("ratio") is not None:
        settings = {**settings, "quality": None}
    return {**settings, **call}
