"""How a request is fused, and what of it decoding keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from a3_engine.decoding.compression import make_compression
from a3_engine.decoding.compression.base import Compression
from a3_engine.fusion.selectors import DEFAULT, make_selector
from a3_engine.fusion.selectors.base import Selector


@dataclass(frozen=True)
class Method:
    """A selector, and a compression of the cache for decoding or None."""

    selector: Selector
    compression: Compression | None = None

    @property
    def name(self) -> str:
        """``"mend"``, or ``"mend+snapkv"``."""
        names = [self.selector.name, *([self.compression.name] if self.compression else [])]
        return "+".join(names)


def make_method(name: str, ratio: float | None = None, keep: float | None = None) -> Method:
    """A method by name: ``"default"``, ``"a3"``, ``"a3+snapkv"``.

    Raises
    ------
    ValueError
        No selector or compression has this name.
    """
    selector, plus, compression = name.partition("+")
    return Method(
        make_selector(DEFAULT if selector == "default" else selector, ratio),
        make_compression(compression, keep) if plus else None,
    )


def make_methods(
    names: Sequence[str], ratios: Sequence[float | None], keep: float | None = None
) -> list[Method]:
    """Every method at every ratio, its own for None; full reuse and full prefill once, at theirs.

    Raises
    ------
    ValueError
        See :func:`make_method`.
    """
    methods = []
    for name in names:
        method = make_method(name, keep=keep)
        fixed = method.selector.ratio in (0.0, 1.0)
        methods += [method] if fixed else [make_method(name, ratio, keep) for ratio in ratios]
    return methods
