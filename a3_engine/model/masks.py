"""Which keys the rows of a pass see, cut into blocks once for all layers that compute them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from a3_engine.devices import send
from a3_engine.processes import cached_property

# A block of sorted rows touches only the keys up to its last row, and a CPU keeps the scores of a
# small one in its caches. An accelerator wants large ones.
CPU_BLOCK_ROWS, BLOCK_ROWS = 128, 1024
LOCAL_BLOCK_ROWS = 128  # rows that see only what is near touch fewer keys the closer they stand

Observer = Callable[[int, torch.Tensor, torch.Tensor, "RowMask", float], None]


class Block(NamedTuple):
    """Rows that are attended together.

    ``keys`` are those that any of them may see, a slice or sorted indices. ``mask``, of shape
    ``(rows, m)``, is added to the scores of the last ``m`` of these keys: minus infinity where a
    row does not see one, else 0.
    """

    rows: slice
    keys: slice | torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class LocalGlobal:
    """Lets rows see less than all keys before them.

    Parameters
    ----------
    global_positions : torch.Tensor
        Sorted positions of the keys that every row sees, as far as they stand before it. They may
        end in some beyond the prompt, which nobody sees.
    window : int
        The row's own position and those just before it, which it sees too.
    dense_from : int
        Rows from this position on see everything.
    """

    global_positions: torch.Tensor
    window: int
    dense_from: int


class Scratch:
    """CPU memory that one block's scores leave to the next's: new pages would cost time."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def take(self, n_values: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory, valid until the next call."""
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < n_values:
            buffer = self._buffers[dtype] = torch.empty(n_values, dtype=dtype)
        return buffer[:n_values]


class Addressed(ABC):
    """Keys and values that are known by their addresses alone, and attend to themselves."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the newest token of each request, ``(requests, 1, heads, head_dim)``."""


class DecodeMask:
    """Stands in for the attention mask of a decoding step: one row for each of several caches."""

    def __init__(self) -> None:
        self.scratch = Scratch()


@dataclass(frozen=True)
class RowMask:
    """Stands in for the attention mask of the layers in a pass.

    Parameters
    ----------
    positions : torch.Tensor
        Sorted positions of the query rows, shape ``(rows,)``, on the model's first device.
    key_positions : torch.Tensor or None
        Sorted positions of the keys, there too; None where key ``j`` stands at position ``j``.
    observer : callable or None
        Called with ``(layer's index, query, key, rows, scaling)`` before the attention is computed.
    local_global : LocalGlobal or None
        What the rows see where it is not everything; for key ``j`` at position ``j``, and for
        layers without a sliding window.
    """

    positions: torch.Tensor
    key_positions: torch.Tensor | None = None
    observer: Observer | None = None
    local_global: LocalGlobal | None = None
    _seen: dict[tuple[int | None, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _plans: dict[tuple[int | None, torch.device, torch.dtype], list[Block]] = field(
        default_factory=dict, repr=False, compare=False
    )
    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False)

    @cached_property
    def slots(self) -> torch.Tensor:
        """Where the rows' own keys stand among the keys."""
        return self.positions if self.key_positions is None else self.keys_before(self.positions)

    def keys_before(self, positions: torch.Tensor) -> torch.Tensor:
        """How many keys stand before each of these positions."""
        if self.key_positions is None:
            return positions.clamp(min=0)
        return torch.searchsorted(self.key_positions, positions)

    def seen(self, window: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row the first key that it sees, and the first after those; ``(1, rows)``.

        Beside these, it sees those that are `LocalGlobal.global_positions`.
        """
        if (window, device) not in self._seen:
            stops = self.keys_before(self.positions + 1)
            if self.local_global is not None:
                starts = (self.positions - self.local_global.window + 1).clamp(min=0)
                starts = starts.masked_fill(self.positions >= self.local_global.dense_from, 0)
            elif window is None:
                starts = torch.zeros_like(stops)
            else:
                starts = self.keys_before(self.positions - window + 1)
            self._seen[window, device] = send(starts[None], device), send(stops[None], device)
        return self._seen[window, device]

    def blocks(self, window: int | None, query: torch.Tensor) -> list[Block]:
        """The rows in blocks, for layers with this sliding window and such queries."""
        plan = window, query.device, query.dtype
        if plan not in self._plans:
            self._plans[plan] = self._cut(*plan)
        return self._plans[plan]

    def _cut(self, window: int | None, device: torch.device, dtype: torch.dtype) -> list[Block]:
        n_rows = len(self.positions)
        size = CPU_BLOCK_ROWS if device.type == "cpu" else BLOCK_ROWS
        (starts,), (stops,) = (each.cpu() for each in self.seen(window, device))
        blocks = []
        n_local_rows = 0
        if self.local_global is not None:
            n_local_rows = int(torch.searchsorted(self.positions, self.local_global.dense_from))
            for at in range(0, n_local_rows, LOCAL_BLOCK_ROWS):
                rows = slice(at, min(at + LOCAL_BLOCK_ROWS, n_local_rows))
                blocks.append(self._local_block(rows, starts, stops, device, dtype))
        for at in range(n_local_rows, n_rows, size):
            rows = slice(at, min(at + size, n_rows))
            first = int(starts[at])
            last = int(stops[rows.stop - 1])
            # Without a window, keys up to the block's first row are visible to all its rows.
            where = torch.arange(first if window else int(stops[at]) - 1, last)
            hidden = (where >= stops[rows, None]) | (where < starts[rows, None])
            blocks.append(Block(rows, slice(first, last), _mask(hidden, device, dtype)))
        return blocks

    def _local_block(
        self,
        rows: slice,
        starts: torch.Tensor,
        stops: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Block:
        assert self.local_global is not None
        first, shared = int(starts[rows.start]), self.local_global.global_positions.cpu()
        # What is shared before the block's first range is visible to all its rows.
        local_global = torch.arange(first, int(stops[rows.stop - 1]))
        far = (local_global < starts[rows, None]) & ~torch.isin(local_global, shared)
        keys = torch.cat([shared[shared < first], local_global]).to(device)
        return Block(rows, keys, _mask((local_global >= stops[rows, None]) | far, device, dtype))


def _mask(hidden: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
