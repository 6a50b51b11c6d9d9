"""The caches of several requests, by their addresses: what a captured decoding step reads.

A CUDA graph is captured once and replayed with other caches. So it never sees their tensors, but a
table of where they lie, which is filled in before each replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from a3_engine.fusion.cache import FusedLayer
from a3_engine.model.batch_cache import BatchCache
from a3_engine.model.masks import Addressed, DecodeMask
from a3_engine.native import kernels_on

COLUMNS = 4  # addresses of keys and values, the step from head to head, tokens there
UNBOUNDED = 2**20  # keys that a step is cut for, whatever there are


class Addresses(Addressed):
    """One layer's keys and values of all requests, as the attention function gets them.

    Parameters
    ----------
    table : torch.Tensor
        int64, ``(requests, COLUMNS)``, on the device.
    grown : torch.Tensor
        int64, ``(requests,)``: tokens added since the table was filled in, before this step.
    kv_heads : int
    """

    def __init__(self, table: torch.Tensor, grown: torch.Tensor, kv_heads: int) -> None:
        self.table, self.grown, self.kv_heads = table, grown, kv_heads

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write each request's newest key and value, ``(requests, kv_heads, 1, head_dim)``."""
        kernels = kernels_on(keys.device)
        assert kernels is not None
        kernels.append(keys, values, self.table, self.grown)

    def attend(
        self,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the newest tokens, ``(requests, 1, heads, head_dim)``."""
        kernels = kernels_on(query.device)
        assert kernels is not None
        last = (self.table[:, 3] + self.grown + 1)[:, None]
        first = (last - window).clamp(min=0) if window else torch.zeros_like(last)
        shape = (1, self.kv_heads, UNBOUNDED, query.shape[-1])
        keys = [torch.empty(1, dtype=query.dtype, device=query.device).expand(shape)]
        return kernels.attend(
            query, keys, keys, first, last, scaling, softcap=softcap, sinks=sinks, table=self.table
        )


class AddressedLayer:
    """One layer of all requests."""

    is_sliding = False
    is_compileable = False
    is_initialized = True

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Addresses, Addresses]:
        self._addresses.append(keys, values)
        return self._addresses, self._addresses


class AddressedCache(BatchCache):
    """What the model's forward takes for its cache while a step is captured.

    Parameters
    ----------
    table : torch.Tensor
        int64, ``(layers, requests, COLUMNS)``.
    grown : torch.Tensor
        int64, ``(requests,)``.
    kv_heads : int
    """

    def __init__(self, table: torch.Tensor, grown: torch.Tensor, kv_heads: int) -> None:
        layers = [AddressedLayer(Addresses(one, grown, kv_heads)) for one in table]
        Cache.__init__(self, layers=layers)  # type: ignore[arg-type]
        self.lengths = [0] * table.shape[1]
        self.mask = DecodeMask()


class Seat:
    """One request's caches in the table, while it decodes.

    Parameters
    ----------
    cache : Cache
        Its prompt is complete. A cache of transformers' gets layers with room in place of its own.
    """

    def __init__(self, cache: Cache) -> None:
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, FusedLayer):
                cache.layers[index] = FusedLayer.following(layer)  # type: ignore[call-overload]
        self._layers: Sequence[FusedLayer] = cache.layers  # type: ignore[assignment]
        self.position = cache.get_seq_length()
        self.grown = 0
        self._spare = 0
        self.rows: list[list[int]] = []

    def make_room(self) -> bool:
        """Have a slot for one more token in every layer; whether the addresses are new ones."""
        if self.rows and self.grown < self._spare:
            return False
        self.settle()
        self._spare = min(layer.make_room(1) for layer in self._layers)
        self.rows = [
            [keys.data_ptr(), values.data_ptr(), keys.stride(1), layer.length]
            for layer in self._layers
            for keys, values in [layer.buffers]
        ]
        return True

    def settle(self) -> None:
        """Let the cache itself know what the steps have added."""
        if self.grown:
            for layer in self._layers:
                layer.lengthen(self.grown)
            self.position += self.grown
            self.grown = 0
