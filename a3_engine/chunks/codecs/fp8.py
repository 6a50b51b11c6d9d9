"""Half of bf16, with the error relative to each element instead of to the largest."""

from __future__ import annotations

import torch

from a3_engine.chunks.codecs.scaled import ScaledCodec


class Fp8(ScaledCodec):
    """e4m3 (3 bits of mantissa), the largest magnitude at its largest value."""

    name = "fp8"
    tolerance = 2.0**-4
    cells = torch.float8_e4m3fn
    top = 448.0
