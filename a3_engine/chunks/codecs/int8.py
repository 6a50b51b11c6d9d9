"""Half of bf16, with the smallest error that one byte allows an even scale."""

from __future__ import annotations

import torch

from a3_engine.chunks.codecs.scaled import ScaledCodec


class Int8(ScaledCodec):
    """Steps of a 127th of the largest magnitude."""

    name = "int8"
    tolerance = 0.5 / 127
    cells = torch.int8
    top = 127.0
