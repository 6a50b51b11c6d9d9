"""The same loops for GPUs, in Triton: attention of scattered rows, placing, KV correction.

They compute what :mod:`a3_engine.native.loops` computes, from indices that lie on the device, so
that no call waits for it. The shapes of the launches follow from the shapes of the tensors alone.
Lengths are run-time values: a new one compiles nothing.
"""

from a3_engine.native.kernels.attention import attend
from a3_engine.native.kernels.placing import append, placer
from a3_engine.native.kernels.shifting import shift

__all__ = ["append", "attend", "placer", "shift"]
