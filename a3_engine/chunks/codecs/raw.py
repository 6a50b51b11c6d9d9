"""The model's own dtype: nothing is lost."""

from __future__ import annotations

import torch

from a3_engine.chunks.codecs.base import FixedCodec, Spec, Tensors
from a3_engine.kv import ChunkKV, Shape


class Raw(FixedCodec):
    """Keys and values as they are."""

    name = "raw"
    tolerance = 0.0

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        return {"keys": Spec(keys, dtype), "values": Spec(values, dtype)}

    def encode(self, kv: ChunkKV) -> Tensors:
        return {"keys": _to_host(kv.keys), "values": _to_host(kv.values)}

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        return ChunkKV(tensors["keys"], tensors["values"])


def _to_host(states: torch.Tensor) -> torch.Tensor:
    """From a GPU into pinned memory, which is several times faster."""
    if states.device.type != "cuda":
        return states.cpu().contiguous()
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)
