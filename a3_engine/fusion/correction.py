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
from functools import partial

import torch

from a3_engine.devices import send
from a3_engine.fusion.cache import FusedCache, FusedLayer
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout
from a3_engine.model.rotary import Rotation, rotate_
from a3_engine.native import kernels_on, loops

Both = tuple[torch.Tensor, torch.Tensor]  # keys and values, or cosines and sines


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

    def follow_head(
        self, start: int, chunk: ChunkKV, head: ChunkKV, cache: FusedCache, rotation: Rotation
    ) -> None:
        """Move the tokens of a prompt's first chunk after its head as the head's tokens are.

        The chunk was computed after a stand-in, which stands nowhere in the prompt. What that does
        to the head's tokens is known, since they are stored with it and without. Each layer is
        moved in its place in the cache when it has arrived there.

        Parameters
        ----------
        start : int
            Position of the chunk's first token.
        chunk : ChunkKV
            Computed after the stand-in.
        head : ChunkKV
            The chunk's first tokens, computed without it.
        cache : FusedCache
            With both loaded, the head over the chunk.
        """
        rest = slice(start + head.n_tokens, start + chunk.n_tokens)
        if rest.start == rest.stop:
            return
        shape, tables = cache.shape, rotation.tables_up_to(rest.stop, cache.devices)
        layers = zip(cache.layers, shape.split(chunk), shape.split(head), tables, strict=True)
        for layer, of_chunk, of_head, table in layers:
            if layer.shape.attends:  # the inputs of layers that fold are not corrected
                layer.after_arrival = partial(self._move_rest, rest, of_chunk, of_head, table)

    @torch.inference_mode()
    def _move_rest(
        self, rest: slice, of_chunk: Both, of_head: Both, table: Both, layer: FusedLayer
    ) -> None:
        device, n_head = layer.device, of_head[0].shape[1]
        known_keys, known = (send(states[:, :n_head], device) for states in of_chunk)
        exact_keys, exact = (send(states, device) for states in of_head)
        keys, values = (states[0, :, rest] for states in layer.stored())
        share = torch.full((keys.shape[1],), self.head_strength, device=device)
        moves = exact_keys - known_keys, exact - known
        cos, sin = table
        _follow(keys, values, share, known, moves, (cos[rest], sin[rest]), self.temperature)


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
        device = keys.device
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
        # Rows are overwritten afterwards, so all tokens between the chunks' ends are moved at once.
        _follow(
            keys[:, self._span],
            values[:, self._span],
            share,
            old_values,
            (key_moves, value_moves),
            (cos[self._span], sin[self._span]),
            self._settings.temperature,
        )

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


def _follow(
    keys: torch.Tensor,
    values: torch.Tensor,
    share: torch.Tensor,
    known: torch.Tensor,
    moves: tuple[torch.Tensor, torch.Tensor],
    table: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> None:
    """Move keys and values, in place, by the mean move of the probes that are like them.

    As :func:`a3_engine.native.loops.shift`; ``known`` are the probes' values before their move,
    and the keys' moves are without position.
    """
    lengths = torch.linalg.vector_norm(known, dim=(0, 2), keepdim=True)
    probes = known / lengths.clamp(min=1e-12)
    if loops.shifts(keys, values, probes, table[0]):
        loops.shift(keys, values, share, probes, moves, table, temperature)
        return
    key_moves, value_moves = moves
    everyone = _flat(values)
    lengths = torch.linalg.vector_norm(everyone, dim=1, keepdim=True).clamp(min=1e-12)
    alike = (everyone @ _flat(probes).T).div_(lengths * temperature)
    weights = torch.softmax(alike, dim=-1, out=alike).mul_(share[:, None])
    for of_head, of_probes in zip(values, value_moves, strict=True):
        of_head.addmm_(weights, of_probes)
    flat_shift = weights @ _flat(key_moves).to(keys.dtype)
    shift = flat_shift.view(len(everyone), len(keys), -1).transpose(0, 1)
    # The shift is an estimate: the model's own precision is enough to turn it.
    rotate_(shift, *table, compute=keys.dtype)
    keys += shift


def _flat(states: torch.Tensor) -> torch.Tensor:
    """``(kv_heads, tokens, head_dim)`` as ``(tokens, kv_heads * head_dim)``."""
    return states.transpose(0, 1).flatten(1)
