"""The fused cache: one preallocated buffer a layer for the whole prompt, and then the answer.

It is an ordinary transformers `Cache`, so the model's forward and `generate` work with it. A layer
starts *pending*: it holds loaded keys and values, but says that it is empty, and the first `update`
writes the fusion pass's rows into their places. From then on it grows like a `DynamicLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from a3_engine.fusion.fuse import FusionPass

ROOM = 256  # tokens added when a buffer is full; a doubled 4k prompt would waste memory


class FusedLayer(DynamicLayer):
    """Keys and values of one layer.

    Parameters
    ----------
    keys, values : torch.Tensor
        Buffers of shape ``(1, kv_heads, capacity, head_dim)``.
    n_prompt : int
        Tokens of the prompt; slots beyond it take the answer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, n_prompt: int) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self.n_prompt = n_prompt
        self.length = 0
        self.rows: torch.Tensor | None = None
        self.before_write: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show()

    @property
    def pending(self) -> bool:
        """Whether the fusion pass has yet to write this layer's rows."""
        return self.length == 0

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self.length]
        self.values = self._values[:, :, : self.length]

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's keys and values, each ``(1, kv_heads, n_prompt, head_dim)``, as a view."""
        return self._keys[:, :, : self.n_prompt], self._values[:, :, : self.n_prompt]

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values, each ``(1, kv_heads, rows, head_dim)``, at positions ``rows``."""
        rows = rows.to(self.device)
        self._keys.index_copy_(2, rows, keys)
        self._values.index_copy_(2, rows, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pending:
            assert self.rows is not None, "a fusion pass sets the rows before it runs a layer"
            if self.before_write is not None:
                self.before_write(key_states, value_states)
            self.write(self.rows, key_states, value_states)
            self.length = self.n_prompt
        else:
            stop = self.length + key_states.shape[2]
            if stop > self._keys.shape[2]:
                self._grow(stop + ROOM)
            self._keys[:, :, self.length : stop] = key_states
            self._values[:, :, self.length : stop] = value_states
            self.length = stop
        self._show()
        return self.keys, self.values

    def _grow(self, capacity: int) -> None:
        extra = capacity - self._keys.shape[2]
        self._keys = torch.nn.functional.pad(self._keys, (0, 0, 0, extra))
        self._values = torch.nn.functional.pad(self._values, (0, 0, 0, extra))

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)
        self._show()


class FusedCache(Cache):
    """The prompt's cache and the pass that completes it."""

    layers: list[FusedLayer]

    def __init__(self, layers: list[FusedLayer]) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.fusion: FusionPass | None = None

    def rewind(self) -> None:
        """Make every layer pending again, as after loading; rows already written stay."""
        for layer in self.layers:
            layer.length = 0
            layer._show()
