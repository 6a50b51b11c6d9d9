"""Compressions by name. A new method is one file in this folder and one line here."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real

from a3_engine.decoding.compression.base import Compression
from a3_engine.decoding.compression.h2o import H2O
from a3_engine.decoding.compression.laq import LAQ, LAQPlusPlus
from a3_engine.decoding.compression.snapkv import SnapKV
from a3_engine.decoding.compression.streaming_llm import Streaming

COMPRESSIONS: dict[str, type[Compression]] = {
    method.name: method for method in (H2O, LAQ, LAQPlusPlus, SnapKV, Streaming)
}


def make_compression(
    compression: str | Compression | None, keep: float | None = None
) -> Compression | None:
    """A compression by name, or the given one, with another share to keep if one is given.

    Raises
    ------
    ValueError
        No compression has this name, or a share was given without one.
    """
    if compression is None:
        if keep is not None:
            raise ValueError(f"keep={keep} needs a compression to apply to.")
        return None
    if isinstance(compression, str):
        if compression not in COMPRESSIONS:
            names = ", ".join(sorted(COMPRESSIONS))
            raise ValueError(f"There is no compression {compression!r}; choose one of {names}.")
        compression = COMPRESSIONS[compression]()
    if not isinstance(compression, Compression):
        raise TypeError(
            f"A compression is a name or a Compression, not {type(compression).__name__}."
        )
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, Real)):
        raise TypeError(f"keep is a number above 0 and up to 1, not {keep!r}.")
    return compression if keep is None else replace(compression, keep=keep)
