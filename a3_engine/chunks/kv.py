"""What one chunk's KV is, in the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChunkKV:
    """One chunk's keys, without position, and values.

    Parameters
    ----------
    keys : torch.Tensor
        Rotated to position 0, shape ``(layers, kv_heads, tokens, head_dim)``.
    values : torch.Tensor
        Same shape and dtype.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
