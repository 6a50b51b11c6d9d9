"""Repairing what is not recomputed.

Context moves the keys and values of a chunk's tokens, and it moves tokens with similar values
alike. The recomputed tokens show how far: each other token is moved by a mean of their moves,
weighted by how similar its stored value is to theirs. Keys are compared without position.

After the idea of AgentKVShift (arXiv 2607.21604), which adds one mean move to all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3_engine import native
from a3_engine.fusion.cache import FusedLayer
from a3_engine.fusion.layout import Layout
from a3_engine.model.rotary import Rotation, rotate_


@dataclass(frozen=True)
class DriftRepair:
    """How far the others follow.

    Parameters
    ----------
    strength : float
        Share of the estimated move that is applied, 0 to 1.
    temperature : float
        Of the softmax over cosine similarities; low follows only the most similar tokens.
    probes : int
        At most so many recomputed tokens, evenly taken, show the way.
    """

    strength: float = 0.6
    temperature: float = 0.1
    probes: int = 64


class Drift:
    """One request's repair, applied as each layer's recomputed rows arrive.

    Parameters
    ----------
    repair : DriftRepair
    layout : Layout
        Chunk tokens are moved; those that are exact are not, and are no probes either.
    rotation : Rotation
        To compare and move keys without position.
    devices : sequence of torch.device
        Where each layer is.
    """

    def __init__(
        self,
        repair: DriftRepair,
        layout: Layout,
        rotation: Rotation,
        devices: Sequence[torch.device],
    ) -> None:
        self._repair = repair
        self._movable = torch.zeros(layout.n_tokens, dtype=torch.bool)
        self._movable[layout.inexact_positions] = True
        self._tables = rotation.tables_up_to(layout.n_tokens, devices)
        where = self._movable.nonzero()[:, 0].tolist() or [0]
        self._span = slice(where[0], where[-1] + 1)
        self._share = repair.strength * self._movable[self._span]

    def apply(
        self,
        index: int,
        layer: FusedLayer,
        rows: torch.Tensor,
        fresh_key: torch.Tensor,
        fresh_value: torch.Tensor,
    ) -> None:
        """Move a layer's other chunk tokens, before the rows are written.

        Parameters
        ----------
        rows : torch.Tensor
            Sorted positions of the computed rows, on the CPU.
        fresh_key, fresh_value : torch.Tensor
            Theirs, ``(1, kv_heads, rows, head_dim)``.
        """
        is_probe = self._movable[rows].nonzero()[:, 0]
        if not len(is_probe):
            return
        limit = self._repair.probes
        if len(is_probe) > limit:
            is_probe = is_probe[torch.linspace(0, len(is_probe) - 1, limit).long()]
        keys, values = (state[0] for state in layer.stored())
        device, dtype = keys.device, keys.dtype
        cos, sin = self._tables[index]
        at, which = rows[is_probe].to(device), is_probe.to(device)

        old_values = values.index_select(1, at)
        value_moves = fresh_value[0].index_select(1, which) - old_values
        key_moves = (fresh_key[0].index_select(1, which) - keys.index_select(1, at)).float()
        rotate_(key_moves, cos[at], sin[at], inverse=True)
        lengths = torch.linalg.vector_norm(old_values, dim=(0, 2), keepdim=True)
        probes = old_values / lengths.clamp(min=1e-12)

        # Rows are overwritten afterwards, so all tokens between the chunks' ends are moved at once.
        keys, values = keys[:, self._span], values[:, self._span]
        table = cos[self._span], sin[self._span]
        # It moves on with the layers' device.
        share = self._share = self._share.to(device, torch.float)
        if native.shifts(keys, values, probes, table[0]):
            native.shift(
                keys,
                values,
                share,
                probes,
                (key_moves, value_moves),
                table,
                self._repair.temperature,
            )
            return
        everyone = _flat(values)
        lengths = torch.linalg.vector_norm(everyone, dim=1, keepdim=True).clamp(min=1e-12)
        alike = (everyone @ _flat(probes).T).div_(lengths * self._repair.temperature)
        weights = torch.softmax(alike, dim=-1, out=alike).mul_(share[:, None])
        for of_head, moves in zip(values, value_moves, strict=True):
            of_head.addmm_(weights, moves)
        flat_shift = weights @ _flat(key_moves).to(dtype)
        shift = flat_shift.view(len(everyone), len(keys), -1).transpose(0, 1)
        # The shift is an estimate: the model's own precision is enough to turn it.
        rotate_(shift, *table, compute=dtype)
        keys += shift


def _flat(states: torch.Tensor) -> torch.Tensor:
    """``(kv_heads, tokens, head_dim)`` as ``(tokens, kv_heads * head_dim)``."""
    return states.transpose(0, 1).flatten(1)
