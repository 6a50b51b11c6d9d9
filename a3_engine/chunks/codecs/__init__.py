"""How keys and values become the tensors of a payload; one file a codec.

A codec is part of a chunk's key, so stores may hold chunks of several. Keys are stored without
position, and outliers sit in the same channels of all tokens then: keys are scaled channel by
channel and values token by token, as KIVI does (Liu et al. 2024, arXiv:2402.02750). `compact`
learns more of a model's keys and values, and has to see some first.
"""

from __future__ import annotations

from a3_engine.chunks.codecs.base import FixedCodec, Format
from a3_engine.chunks.codecs.compact import BASIS, STRENGTHS, BasisFormat, CompactFormat
from a3_engine.chunks.codecs.int4 import Int4
from a3_engine.chunks.codecs.int8 import Int8
from a3_engine.chunks.codecs.raw import Raw

CODECS: dict[str, FixedCodec] = {codec.name: codec for codec in (Raw(), Int8(), Int4())}
CODEC_NAMES = (*CODECS, *STRENGTHS)
FORMATS: dict[str, Format] = {
    **CODECS,
    **dict.fromkeys(STRENGTHS, CompactFormat()),
    BASIS: BasisFormat(),
}
DEFAULT_CODEC = Raw.name


def check_codec(name: str) -> str:
    """The name of a codec.

    Raises
    ------
    ValueError
        There is none.
    """
    if name not in CODEC_NAMES:
        raise ValueError(f"There is no codec {name!r}; use one of {', '.join(CODEC_NAMES)}.")
    return name
