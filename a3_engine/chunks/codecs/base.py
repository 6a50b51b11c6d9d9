"""What a codec is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch

from a3_engine.kv import ChunkKV, Shape

Tensors = dict[str, torch.Tensor]
ANY = -1  # the size of an axis that each chunk decides


class Spec(NamedTuple):
    """Shape and dtype of one tensor of a payload; ``most`` bounds an axis of any size."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    most: int = 0

    def accepts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is so."""
        sizes = tuple(tensor.shape)
        return (
            tensor.dtype == self.dtype
            and len(sizes) == len(self.shape)
            and all(
                found <= self.most if size == ANY else found == size
                for found, size in zip(sizes, self.shape, strict=True)
            )
        )

    @property
    def nbytes(self) -> tuple[int, int]:
        """The least and the most that it can take."""
        return self._nbytes(0), self._nbytes(self.most)

    def _nbytes(self, free: int) -> int:
        return math.prod(free if n == ANY else n for n in self.shape) * self.dtype.itemsize


class Format(Protocol):
    """What a payload's tensors look like.

    ``by_layer`` says that the first axis of every tensor is the layers, so that payloads can be cut
    there.
    """

    by_layer: bool

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that chunks of these shapes and dtype have: exactly these are accepted."""


class Codec(Protocol):
    """How keys and values become such tensors, and back.

    ``identity`` is part of every chunk's key: the name, and what it was calibrated to.
    """

    name: str

    @property
    def identity(self) -> str: ...

    def nbytes(self, keys: Shape, values: Shape, dtype: torch.dtype) -> int:
        """Bytes of such a chunk, before it is known: its tensors', or about so many."""

    def encode(self, kv: ChunkKV) -> Tensors:
        """Tensors of the layout, on the CPU."""

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        """Keys and values of these shapes and dtype; may share memory with the tensors."""


class FixedCodec(ABC):
    """Stateless: what is stored follows from the shapes alone.

    ``tolerance`` is the largest error that decoding may leave, as a share of the largest magnitude
    in the channel (keys) or token (values) that an element belongs to.
    """

    name: str
    tolerance: float
    by_layer = True

    @property
    def identity(self) -> str:
        return self.name

    @abstractmethod
    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        """As :meth:`Format.layout`."""

    def nbytes(self, keys: Shape, values: Shape, dtype: torch.dtype) -> int:
        return sum(spec.nbytes[1] for spec in self.layout(keys, values, dtype).values())

    @abstractmethod
    def encode(self, kv: ChunkKV) -> Tensors:
        """As :meth:`Codec.encode`."""

    @abstractmethod
    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        """As :meth:`Codec.decode`."""
