"""The chunks used last, decoded, in the memory of the device that computes.

What many questions retrieve need not come over the bus each time. Memory that the model or a
request wants goes first: the engine empties this when an allocation fails.
"""

from __future__ import annotations

import torch

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.kv import ChunkKV

SHARE_OF_FREE = 1 / 4  # of the device's memory beside the model


class Resident(BoundedLRU[str, ChunkKV]):
    """Decoded chunks on a device by key; nobody may write into one that is kept."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes=max_bytes, nbytes=lambda kv: kv.nbytes)

    @classmethod
    def on(cls, device: torch.device) -> Resident:
        """One with a share of what is free on a GPU now; on a CPU, where memory is one, of none."""
        if device.type != "cuda":
            return cls(0)
        return cls(int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE))
