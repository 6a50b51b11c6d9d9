"""How keys and values become the tensors of a payload; one file a codec.

A codec is part of a chunk's key, so stores may hold chunks of several. Keys are stored without
position, and outliers sit in the same channels of all tokens then: keys are scaled channel by
channel and values token by token, as KIVI does (Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

from a3_engine.chunks.codecs.base import Codec
from a3_engine.chunks.codecs.int4 import Int4
from a3_engine.chunks.codecs.int8 import Int8
from a3_engine.chunks.codecs.raw import Raw

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Int8(), Int4())}
DEFAULT_CODEC = Raw.name


def get_codec(name: str) -> Codec:
    """The codec of this name.

    Raises
    ------
    ValueError
        There is none.
    """
    if name not in CODECS:
        raise ValueError(f"There is no codec {name!r}; use one of {', '.join(CODECS)}.")
    return CODECS[name]
