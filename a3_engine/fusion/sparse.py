"""The queries that a `SparseSelector` compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from a3_engine.bounded_lru import BoundedLRU
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fusion_pass import FusionPass
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout, Span
from a3_engine.model.hooks import run_pass
from a3_engine.model.masks import RowMask
from a3_engine.model.rotary import Rotation, rotate_

REMEMBERED = 4096  # local queries kept in memory; a few kB each


class LocalQueries:
    """The mean query of every chunk's end, seen from its own chunk; computed once a process.

    Parameters
    ----------
    model, rotation
        What computes them.
    """

    def __init__(self, model: PreTrainedModel, rotation: Rotation) -> None:
        self._model, self._rotation = model, rotation
        self._known: BoundedLRU[tuple[object, ...], torch.Tensor] = BoundedLRU(REMEMBERED)

    def get(
        self,
        n_local: int,
        layers: range,
        prefix: tuple[tuple[int, ...], ChunkKV | None],
        ids: tuple[int, ...],
        kv: ChunkKV,
    ) -> torch.Tensor:
        """Without position, ``(layers, heads, head_dim)``.

        Parameters
        ----------
        n_local : int
            Last tokens of the chunk whose queries count.
        layers : range
            The layers whose queries are wanted.
        prefix
            Ids and KV of what the chunk was computed after.
        ids, kv
            The chunk's own.
        """
        key = (prefix[0], ids, n_local, layers)
        if (known := self._known.get(key)) is None:
            known = self._compute(n_local, layers, prefix, ids, kv)
            self._known.put(key, known)
        return known

    def _compute(
        self,
        n_local: int,
        layers: range,
        prefix: tuple[tuple[int, ...], ChunkKV | None],
        ids: tuple[int, ...],
        kv: ChunkKV,
    ) -> torch.Tensor:
        prefix_ids, prefix_kv = prefix
        start, stop = len(prefix_ids), len(prefix_ids) + len(ids)
        ends = torch.arange(max(start, stop - n_local), stop)
        cache = allocate(self._model, stop, stop)
        loaded = [] if prefix_kv is None else [(0, prefix_kv)]
        load_chunks(cache, self._rotation, [*loaded, (start, kv)])
        layout = Layout(stop, (Span(start, stop),), start, fresh=ends, question=ends)
        return mean_queries(
            self._model.get_decoder(), self._rotation, cache, layout, prefix_ids + ids, layers
        )


@torch.inference_mode()
def mean_queries(
    decoder: PreTrainedModel,
    rotation: Rotation,
    cache: FusedCache,
    layout: Layout,
    ids: Sequence[int],
    layers: range,
) -> torch.Tensor:
    """Mean query, without position, of a layout's question over a loaded cache.

    Returns
    -------
    torch.Tensor
        fp32, ``(layers, heads, head_dim)``.
    """
    tables = rotation.tables(layout.question, cache.devices)
    index = torch.searchsorted(layout.fresh, layout.question)
    means: list[torch.Tensor] = []

    def record(
        layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        if layer in layers:
            cos, sin = tables[layer]
            mine = query[0, :, index.to(query.device)].float()
            rotate_(mine, cos, sin, inverse=True)
            means.append(mine.mean(1))

    fusion = FusionPass(cache, layout)
    with fusion.only_fresh(record):
        run_pass(decoder, [ids], cache)
    return torch.stack([mean.to(means[0].device) for mean in means])
