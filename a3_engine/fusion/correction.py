"""Repairing what is not recomputed.

Context moves the keys and values of a chunk's tokens, and it moves tokens with similar values
alike. The recomputed tokens show how far: each other token is moved by a mean of their moves,
weighted by how similar its stored value is to theirs. Keys are compared without position.

The chunk that opens a prompt is moved once more: the first tokens of it are stored twice, with
the stand-in before them and without, which shows how far the stand-in has moved the rest.

After the idea of AgentKVShift (arXiv 2607.21604), which adds one mean move to all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3_engine.devices import send
from a3_engine.fusion.cache import FusedCache, FusedLayer
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout
from a3_engine.model.rotary import Rotation, rotate_
from a3_engine.native import kernels_on, loops


@dataclass(frozen=True)
class KVCorrection:
    """How far the others follow.

    Parameters
    ----------
    strength : float
        Share of the estimated move that is applied, 0 to 1.
    temperature : float
        Of the softmax over cosine similarities; low follows only the most similar tokens.
    probes : int
        Recomputed tokens that show the way at most, evenly taken.
    head_strength : float
        Share of the move of its head that the rest of a prompt's first chunk follows; see
        :meth:`follow_head`.
    """

    strength: float = 0.6
    temperature: float = 0.1
    probes: int = 64
    head_strength: float = 0.0

    def follow_head(self, chunk: ChunkKV, head: ChunkKV, cache: FusedCache) -> ChunkKV:
        """The tokens of a prompt's first chunk after its head, moved as the head's tokens are.

        The chunk was computed after a stand-in, which stands nowhere in the prompt. What that does
        to the head's tokens is known, since they are stored with it and without.

        Parameters
        ----------
        chunk : ChunkKV
            Computed after the stand-in.
        head : ChunkKV
            The chunk's first tokens, computed without it.
        cache : FusedCache
            Where both will stand.
        """
        device, n_head = cache.devices[0], head.n_tokens
        layers = []
        for chunk_layer, head_layer in zip(
            cache.shape.split(chunk), cache.shape.split(head), strict=True
        ):
            states = [each.to(device, non_blocking=True) for each in chunk_layer]
            exact = [each.to(device, non_blocking=True) for each in head_layer]
            known = [each[:, :n_head] for each in states]
            everyone = torch.nn.functional.normalize(_flat(states[1]).float())
            alike = everyone[n_head:] @ everyone[:n_head].mT
            weights = torch.softmax(alike / self.temperature, dim=-1).mul_(self.head_strength)
            keys, values = (
                each[:, n_head:] + weights.to(each.dtype) @ (new - old)
                for each, new, old in zip(states, exact, known, strict=True)
            )
            layers.append((keys, values))
        return cache.shape.chunk(layers, device)


class Corrector:
    """One request's correction, applied as each layer's recomputed rows arrive.

    Parameters
    ----------
    correction : KVCorrection
    layout : Layout
        Chunk tokens are moved; those that are exact are not, and are no probes either.
    rotation : Rotation
        To compare and move keys without position.
    devices : sequence of torch.device
        Where each layer is.
    """

    def __init__(
        self,
        correction: KVCorrection,
        layout: Layout,
        rotation: Rotation,
        devices: Sequence[torch.device],
    ) -> None:
        self._settings = correction
        movable = torch.zeros(layout.n_tokens, dtype=torch.bool)
        inexact = [slice(s.start + s.exact, s.stop) for s in layout.chunks]
        for span in inexact:
            movable[span] = True
        self._span = slice(inexact[0].start, inexact[-1].stop) if inexact else slice(0, 1)
        self._movable = send(movable, devices[0])
        self._share = send(correction.strength * movable[self._span].float(), devices[0])
        self._tables = rotation.tables_up_to(layout.n_tokens, devices)
        self._rows: torch.Tensor | None = None

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
            Sorted positions of the computed rows, on the first layer's device.
        fresh_key, fresh_value : torch.Tensor
            Theirs, ``(1, kv_heads, rows, head_dim)``.
        """
        if self._rows is not rows:
            self._rows = rows
            self._which, self._count = self._probes(rows)
        keys, values = (state[0] for state in layer.stored())
        device, dtype = keys.device, keys.dtype
        which, count = send(self._which, device), send(self._count, device)
        rows = send(rows, device)
        # It moves on with the layers' device.
        share = self._share = send(self._share, device)
        kernels = kernels_on(device)
        if kernels is not None and self._tables[index][0].dim() == 2:  # it turns halves
            kernels.shift(
                keys,
                values,
                self._span,
                share,
                rows,
                which,
                count,
                (fresh_key[0], fresh_value[0]),
                self._tables[index],
                self._settings.temperature,
            )
            return
        which = which[: int(count)]
        if not len(which):
            return
        cos, sin = self._tables[index]
        at = rows[which]

        old_values = values.index_select(1, at)
        value_moves = fresh_value[0].index_select(1, which) - old_values
        key_moves = (fresh_key[0].index_select(1, which) - keys.index_select(1, at)).float()
        rotate_(key_moves, cos[at], sin[at], inverse=True)
        lengths = torch.linalg.vector_norm(old_values, dim=(0, 2), keepdim=True)
        probes = old_values / lengths.clamp(min=1e-12)

        # Rows are overwritten afterwards, so all tokens between the chunks' ends are moved at once.
        keys, values = keys[:, self._span], values[:, self._span]
        table = cos[self._span], sin[self._span]
        if loops.shifts(keys, values, probes, table[0]):
            loops.shift(
                keys,
                values,
                share,
                probes,
                (key_moves, value_moves),
                table,
                self._settings.temperature,
            )
            return
        everyone = _flat(values)
        lengths = torch.linalg.vector_norm(everyone, dim=1, keepdim=True).clamp(min=1e-12)
        alike = (everyone @ _flat(probes).T).div_(lengths * self._settings.temperature)
        weights = torch.softmax(alike, dim=-1, out=alike).mul_(share[:, None])
        for of_head, moves in zip(values, value_moves, strict=True):
            of_head.addmm_(weights, moves)
        flat_shift = weights @ _flat(key_moves).to(dtype)
        shift = flat_shift.view(len(everyone), len(keys), -1).transpose(0, 1)
        # The shift is an estimate: the model's own precision is enough to turn it.
        rotate_(shift, *table, compute=dtype)
        keys += shift

    def _probes(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows show the way, evenly taken from the chunks' own, and how many do.

        The number is a tensor, which only the device knows; what lies beyond it means nothing.
        """
        passed = self._movable.index_select(0, rows).cumsum(0)
        n_movable = passed[-1]
        limit = min(self._settings.probes, len(rows))
        nth = torch.arange(limit, device=rows.device)
        spread = nth * (n_movable - 1).clamp(min=0) // max(limit - 1, 1)
        nth = torch.where(n_movable > limit, spread, nth)
        which = torch.searchsorted(passed, nth + 1).clamp(max=len(rows) - 1)
        return which, n_movable.clamp(max=limit)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """``(kv_heads, tokens, head_dim)`` as ``(tokens, kv_heads * head_dim)``."""
    return states.transpose(0, 1).flatten(1)
