"""One byte an element, with the largest magnitude of a channel or token mapped to the top."""

from __future__ import annotations

import torch

from a3_engine.chunks.codecs.base import FixedCodec, Spec, Tensors
from a3_engine.kv import ChunkKV, Shape

TOKENS, CHANNELS = 2, 3  # axes of (layers, kv_heads, tokens, head_dim)
AXES = {"keys": TOKENS, "values": CHANNELS}  # what one scale is shared along


class ScaledCodec(FixedCodec):
    """Symmetric, with fp32 scales: keys by channel, values by token.

    ``cells`` is the dtype of an element, ``top`` its largest value.
    """

    cells: torch.dtype
    top: float

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        specs = {}
        for (name, axis), shape in zip(AXES.items(), (keys, values), strict=True):
            scales = list(shape)
            scales[axis] = 1
            specs[name] = Spec(shape, self.cells)
            specs[f"{name}_scale"] = Spec(tuple(scales), torch.float32)
        return specs

    def encode(self, kv: ChunkKV) -> Tensors:
        tensors: Tensors = {}
        for name, axis in AXES.items():
            exact = getattr(kv, name).cpu().float()
            scale = exact.abs().amax(axis, keepdim=True) / self.top
            steps = exact / torch.where(scale > 0, scale, 1)
            if not self.cells.is_floating_point:
                steps.round_()
            tensors[name] = steps.clamp_(-self.top, self.top).to(self.cells)
            tensors[f"{name}_scale"] = scale
        return tensors

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        return ChunkKV(
            *((tensors[name].float() * tensors[f"{name}_scale"]).to(dtype) for name in AXES)
        )
