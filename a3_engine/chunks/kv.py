"""What one chunk's KV is, in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from a3_engine.errors import UnsupportedModelError
from a3_engine.model.caching import with_cache
from a3_engine.model.devices import input_device

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
    """What a layer keeps of each token: a key and a value for each of its heads."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class KVShape:
    """The shapes of a model's keys and values, of every layer that has its own.

    Where layers differ (Gemma 4), their heads are cut into pieces of one size, and the pieces of
    all heads of all layers take the place of a chunk's layers, with one head each.
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
            heads, key_dim, value_dim = self.layers[0]
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
        keys, values = ([states.to(device) for states in each] for each in zip(*layers, strict=True))
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
        return [
            (_joined(keys, each.heads), _joined(values, each.heads))
            for each, keys, values in zip(
                self.layers, kv.keys.split(counts), kv.values.split(counts), strict=True
            )
        ]


def _cut(states: torch.Tensor, size: int) -> torch.Tensor:
    """``(heads, tokens, head_dim)`` as ``(pieces, 1, tokens, size)``."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2).flatten(0, 1)[:, None]


def _joined(pieces: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`_cut`."""
    return pieces[:, 0].unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)


@torch.inference_mode()
def kv_shape(decoder: PreTrainedModel) -> KVShape:
    """What a decoder keeps of each token: of one token it shows, and is asked once."""
    known: KVShape | None = getattr(decoder.layers, "_a3_kv_shape", None)
    if known is None:
        cache = DynamicCache()
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(decoder))
        decoder(input_ids=token, **with_cache(decoder, cache), use_cache=True)
        known = KVShape(
            tuple(
                LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
                for layer in cache.layers
            )
        )
        decoder.layers._a3_kv_shape = known  # type: ignore[union-attr, assignment]
    return known


def token_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, over all layers."""
    return kv_shape(model.get_decoder()).token_size * model.dtype.itemsize
