"""A quarter of bf16: 16 even steps between the least and the greatest of each small group."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from a3_engine.chunks.codecs.base import FixedCodec, Spec, Tensors
from a3_engine.kv import ChunkKV, Shape

GROUP = 32
STEPS = 15


class Int4(FixedCodec):
    """Groups of 32 tokens of one channel (keys) or 32 channels of one token (values).

    Each group has its least value and its step in bf16; two elements share a byte.
    """

    name = "int4"
    # Half a step of twice the magnitude, and bf16's rounding of the least value and of 15 steps.
    tolerance = 1.0 / STEPS + 3 * 2.0**-8

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        specs = {}
        for name, lines, length in (("keys", keys[3], keys[2]), ("values", values[2], values[3])):
            groups = (*keys[:2], lines, -(-length // GROUP))
            specs[name] = Spec((*groups, GROUP // 2), torch.uint8)
            specs[f"{name}_step"] = specs[f"{name}_least"] = Spec(groups, torch.bfloat16)
        return specs

    def encode(self, kv: ChunkKV) -> Tensors:
        tensors: Tensors = {}
        for name, lines in (("keys", kv.keys.transpose(2, 3)), ("values", kv.values)):
            exact = lines.cpu().float()
            missing = -exact.shape[-1] % GROUP
            if missing:  # repeat the last element, which leaves its group's range as it is
                flat = pad(exact.flatten(0, 1), (0, missing), mode="replicate")
                exact = flat.reshape(*exact.shape[:-1], -1)
            groups = exact.reshape(*exact.shape[:-1], -1, GROUP)
            least, most = groups.aminmax(dim=-1)
            least = least.bfloat16()
            step = ((most - least.float()) / STEPS).bfloat16()
            width = torch.where(step > 0, step, 1).float()
            steps = (groups - least[..., None].float()) / width[..., None]
            cells = steps.round_().clamp_(0, STEPS).to(torch.uint8)
            tensors[name] = cells[..., ::2] | cells[..., 1::2] << 4
            tensors[f"{name}_step"], tensors[f"{name}_least"] = step, least
        return tensors

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        decoded = []
        for name, length in (("keys", keys[2]), ("values", values[3])):
            packed = tensors[name]
            cells = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float()
            step, least = tensors[f"{name}_step"].float(), tensors[f"{name}_least"].float()
            lines = torch.addcmul(least[..., None], cells, step[..., None]).flatten(-2)
            decoded.append(lines[..., :length].to(dtype))
        return ChunkKV(decoded[0].transpose(2, 3).contiguous(), decoded[1].contiguous())
