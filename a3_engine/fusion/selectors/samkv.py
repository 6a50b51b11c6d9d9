"""SamKV: a sparse cache of many contexts (arXiv 2508.11661, AAAI 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from a3_engine.devices import send
from a3_engine.fusion.cache import BeforeWrite, FusedLayer
from a3_engine.fusion.selectors.kinds import SparseSelector
from a3_engine.layout import Layout, Span
from a3_engine.model.rotary import Rotation


@dataclass(frozen=True)
class SamKV(SparseSelector):
    """Keeps the blocks of every chunk that a query made for that chunk finds.

    1. The question is run over the first and last tokens of the chunks only; its mean query is the
       generic one. Each chunk's *local* query is that of its last tokens, seen from its own chunk.
    2. A chunk's query adds the other chunks' local queries to the generic one, weighted by their
       cosine similarity to it, by head.
    3. A block of a chunk is scored by its mean key. How far the best block stands above the chunk's
       anchor (the mean key of its first and last tokens), against the spread of its blocks, is the
       share of blocks that the chunk may keep.
    4. What stays is computed again over itself at its original positions, and is decoded on.

    There is no released code; the paper leaves open, and chosen here: queries are averaged without
    position and then rotated to the prompt's last one, so that chunks compare; the blocks that the
    chunks may keep are ranked against each other by their score less their chunk's anchor, averaged
    over the layers, and the best fill the budget; the same tokens stay in all layers; where a share
    is undefined, because the anchor lies outside the blocks' scores, the chunk keeps all blocks
    (anchor below) or none (above); in the update by ``"fusion"`` the weight of the new state is its
    cosine similarity to the old one, by token and head, not below zero.

    Parameters
    ----------
    ratio : float
        Share of the prompt's tokens that stay, fresh ones included; about 0.15 in the paper.
    n_init, n_local : int
        First and last tokens of every chunk that stay in any case; few, for chunks of a hundred
        tokens.
    block : int
        Tokens a block.
    stable_layers : int
        The last layers, whose queries and keys are compared.
    update : str
        ``"overwrite"``: the kept tokens' states are the new ones; ``"fusion"``: a mean of both.
    """

    name: ClassVar[str] = "samkv"
    n_init: int = 2
    n_local: int = 4
    block: int = 8
    stable_layers: int = 4
    update: Literal["overwrite", "fusion"] = "overwrite"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.n_init, self.n_local, self.block, self.stable_layers) < 1:
            raise ValueError("n_init, n_local, block and stable_layers are at least 1.")
        if self.update not in ("overwrite", "fusion"):
            raise ValueError(f"The update is 'overwrite' or 'fusion', not {self.update!r}.")

    def layers(self, n_layers: int) -> range:
        return range(max(0, n_layers - self.stable_layers), n_layers)

    def _ends(self, span: Span) -> torch.Tensor:
        inner = self._inner(span)
        return torch.cat(
            [torch.arange(span.start, inner.start), torch.arange(inner.stop, span.stop)]
        )

    def _inner(self, span: Span) -> range:
        start = min(span.start + self.n_init, span.stop)
        return range(start, max(start, span.stop - self.n_local))

    def background(self, layout: Layout) -> torch.Tensor:
        return torch.cat([self._ends(span) for span in layout.chunks])

    def select(
        self, layout: Layout, question: torch.Tensor, local: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        question, local, keys = question.float(), local.float(), keys.float()
        similarity = torch.cosine_similarity(local, question[:, None], dim=-1).abs()[..., None]
        weighted = similarity * local
        others = max(len(layout.chunks) - 1, 1)
        kept, candidates, scores = [self.background(layout)], [], []
        for index, span in enumerate(layout.chunks):
            blocks = [
                torch.arange(start, min(start + self.block, self._inner(span).stop))
                for start in self._inner(span)[:: self.block]
            ]
            if not blocks:
                continue
            query = question + (weighted.sum(1) - weighted[:, index]) / others
            anchor = _score(query, keys[:, :, self._ends(span)].mean(2, keepdim=True))[:, 0]
            means = torch.stack([keys[:, :, block].mean(2) for block in blocks], dim=2)
            score = _score(query, means)
            allowed = int(len(blocks) * float(_share(score, anchor).mean()))
            above = (score - anchor[:, None]).mean(0)
            for best in above.argsort(descending=True, stable=True)[:allowed].tolist():
                candidates.append(blocks[best])
                scores.append(float(above[best]))
        room = int(layout.n_tokens * self.ratio) - len(layout.with_chunk_tokens(kept[0]))
        for best in torch.tensor(scores).argsort(descending=True, stable=True).tolist():
            if room < len(candidates[best]):
                break
            kept.append(candidates[best])
            room -= len(candidates[best])
        return torch.cat(kept)

    def before_write(
        self, layout: Layout, rotation: Rotation, devices: Sequence[torch.device]
    ) -> BeforeWrite | None:
        if self.update == "overwrite":
            return None
        return partial(_mean_with_stored, layout.chunk_positions)


def _mean_with_stored(
    chunk_positions: torch.Tensor,
    index: int,
    layer: FusedLayer,
    rows: torch.Tensor,
    fresh_key: torch.Tensor,
    fresh_value: torch.Tensor,
) -> None:
    """The update by fusion, of chunk tokens alone; see `BeforeWrite` for the other parameters."""
    assert layer.rows is not None
    which = torch.isin(rows, send(chunk_positions, rows.device)).nonzero()[:, 0]
    slots, which = layer.rows[which].to(layer.device), which.to(layer.device)
    for fresh, stored in zip((fresh_key, fresh_value), layer.stored(), strict=True):
        new, old = fresh[:, :, which].float(), stored[:, :, slots].float()
        share = torch.cosine_similarity(new, old, dim=-1).clamp(min=0.0)
        fresh[:, :, which] = torch.lerp(old, new, share[..., None]).to(fresh.dtype)


def _score(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products summed over heads: ``(layers, heads, d)``, ``(layers, kv_heads, n, d)`` to
    ``(layers, n)``."""
    layers, kv_heads, _, head_dim = keys.shape
    grouped = query.view(layers, kv_heads, -1, head_dim).mean(2)
    return torch.einsum("lhd,lhnd->ln", grouped, keys)


def _share(score: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Each layer's share of blocks to keep, from ``(layers, blocks)`` and ``(layers,)``."""
    high, low = score.max(1).values, score.min(1).values
    share = (high - anchor) / (high - low).clamp(min=1e-12)
    return share.clamp(0.0, 1.0)
