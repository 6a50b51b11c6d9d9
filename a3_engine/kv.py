"""What one chunk's KV is, in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch

from a3_engine.errors import UnsupportedModelError
from a3_engine.processes import cached_property

Shape = tuple[int, int, int, int]  # (layers, kv_heads, tokens, head_dim)


@dataclass(frozen=True)
class ChunkKV:
    """One chunk's keys, without position, and values.

    Parameters
    ----------
    keys : torch.Tensor
        Rotated to position 0, shape ``(layers, kv_heads, tokens, head_dim)``; see `KVShape` for
        models whose layers have several shapes.
    values : torch.Tensor
        Same dtype, and same shape up to the last axis.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class LayerShape(NamedTuple):
    """What a layer keeps of each token: a key and a value for each of its heads.

    ``latent`` says that it expands them to those of more heads; see :mod:`a3_engine.model.latent`.
    One that ``folds`` its input into so many states has no keys, and keeps that input, cut into as
    many numbers; see :mod:`a3_engine.model.folding`.
    """

    heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    folds: int = 0

    def ours(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from what transformers calls so, and back."""
        return (values, keys) if self.latent else (keys, values)

    @property
    def attends(self) -> bool:
        """Whether it has keys and values, and not inputs or nothing."""
        return bool(self.heads) and not self.folds

    @property
    def size(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)

    def cut(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A folding layer's input, ``(prompts, tokens, size)``, as keys and values; filled up."""
        sizes = [self.heads * self.key_dim, self.heads * self.value_dim]
        inputs = torch.nn.functional.pad(inputs, (0, sum(sizes) - inputs.shape[-1]))
        keys, values = (
            part.view(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part in torch.split(inputs, sizes, dim=-1)
        )
        return keys, values

    def joined(self, keys: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
        """The inverse of :meth:`cut`."""
        parts = [part.transpose(1, 2).flatten(2) for part in (keys, values)]
        return torch.cat(parts, dim=-1)[..., :size]


@dataclass(frozen=True)
class KVShape:
    """The shapes of a model's keys and values, of every layer that has its own.

    Where layers differ (Gemma 4, hybrids), their heads are cut into pieces of one size, and the
    pieces of all heads of all layers take the place of a chunk's layers, with one head each.
    """

    layers: tuple[LayerShape, ...]

    @property
    def alike(self) -> bool:
        """Whether all layers have one shape, so that a chunk's layers are the model's."""
        return len(set(self.layers)) == 1

    @property
    def plain(self) -> bool:
        """Whether, besides, values are as large as keys: so kernels and native loops want them."""
        return self.alike and self.layers[0].key_dim == self.layers[0].value_dim

    @cached_property
    def _piece(self) -> tuple[int, int]:
        key_dim = gcd(*(layer.key_dim for layer in self.layers))
        value_dim = gcd(*(layer.value_dim for layer in self.layers))
        if any(each.key_dim // key_dim != each.value_dim // value_dim for each in self.layers):
            raise UnsupportedModelError("its layers' keys and values have no common measure")
        return key_dim, value_dim

    def of_chunk(self, n_tokens: int) -> tuple[Shape, Shape]:
        """Shapes of a chunk's keys and values."""
        if self.alike:
            heads, key_dim, value_dim = self.layers[0][:3]
            rows = len(self.layers)
        else:
            heads, (key_dim, value_dim) = 1, self._piece
            rows = sum(each.heads * (each.key_dim // key_dim) for each in self.layers)
        return (rows, heads, n_tokens, key_dim), (rows, heads, n_tokens, value_dim)

    @property
    def token_size(self) -> int:
        """Numbers in one token's keys and values, over all layers."""
        return sum(layer.size for layer in self.layers)

    def chunk(
        self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ) -> ChunkKV:
        """A chunk from each layer's keys and values, ``(kv_heads, tokens, head_dim)``."""
        keys = [keys.to(device) for keys, _ in layers]
        values = [values.to(device) for _, values in layers]
        if self.alike:
            return ChunkKV(torch.stack(keys), torch.stack(values))
        key_dim, value_dim = self._piece
        return ChunkKV(
            torch.cat([_cut(states, key_dim) for states in keys]),
            torch.cat([_cut(states, value_dim) for states in values]),
        )

    def split(self, kv: ChunkKV) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values of a chunk, ``(kv_heads, tokens, head_dim)``."""
        if self.alike:
            return list(zip(kv.keys, kv.values, strict=True))
        counts = [each.heads * (each.key_dim // self._piece[0]) for each in self.layers]
        keys, values = torch.split(kv.keys, counts), torch.split(kv.values, counts)
        return [
            (_joined(key, each.heads), _joined(value, each.heads))
            for each, key, value in zip(self.layers, keys, values, strict=True)
        ]


def _cut(states: torch.Tensor, size: int) -> torch.Tensor:
    """``(heads, tokens, head_dim)`` as ``(pieces, 1, tokens, size)``."""
    heads, tokens, dim = states.shape
    pieces = states.reshape(heads, tokens, dim // size, size).transpose(1, 2)
    return pieces.flatten(0, 1)[:, None]


def _joined(pieces: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`_cut`."""
    n_pieces, _, tokens, size = pieces.shape
    each = n_pieces // max(heads, 1)
    return pieces.reshape(heads, each, tokens, size).transpose(1, 2).flatten(2)
