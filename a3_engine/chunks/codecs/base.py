"""What a codec is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from a3_engine.kv import ChunkKV, Shape

Tensors = dict[str, torch.Tensor]


class Spec(NamedTuple):
    """Shape and dtype of one tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Codec(Protocol):
    """Stateless. The first axis of every tensor is the layers, so that payloads can be cut there.

    ``tolerance`` is the largest error that decoding may leave, as a share of the largest magnitude
    in the channel (keys) or token (values) that an element belongs to.
    """

    name: str
    tolerance: float

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that chunks of these shapes and dtype have: exactly these are accepted."""

    def encode(self, kv: ChunkKV) -> Tensors:
        """Tensors of the layout, on the CPU."""

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        """Keys and values of these shapes and dtype; may share memory with the tensors."""
