"""The four kinds of selectors, by what they look at.

That is the layout, one layer's states, the question's attention, or, block by block, what is kept
at all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_engine.fusion.attention_sums import Pool
from a3_engine.fusion.cache import FusedLayer
from a3_engine.fusion.fusion_pass import Pruning, SelectAt, States
from a3_engine.fusion.scoring import question_alone, question_attention
from a3_engine.fusion.selectors.base import Prepared, Run, Selector
from a3_engine.fusion.sparse import mean_queries
from a3_engine.layout import Layout
from a3_engine.model.masks import LocalGlobal
from a3_engine.model.rotary import rotate_


def attending(layers: Sequence[FusedLayer]) -> list[int]:
    """Which layers have keys."""
    return [index for index, layer in enumerate(layers) if layer.shape.attends]


@dataclass(frozen=True)
class BoundarySelector(Selector):
    """Selects by where the chunks stand, before the pass begins."""

    def _prepare(self, run: Run) -> Prepared:
        fusion = self._start(run, run.cache)
        fusion.recompute(self.select(fusion.layout))
        return Prepared(run.cache, fusion)

    @abstractmethod
    def select(self, layout: Layout) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order."""


@dataclass(frozen=True)
class LayerSelector(Selector):
    """Selects inside the pass, at ``layer``; the layers before it are computed for all tokens.

    In a hybrid model that is the next layer that has keys.

    As in the released code of A³ and CacheBlend, the ratio is that of all tokens before the
    question: a prefix counts towards the budget, though its tokens are never picked.
    """

    layer: int = 1

    def _prepare(self, run: Run) -> Prepared:
        if not 0 <= self.layer < len(run.cache.layers):
            raise ValueError(
                f"{self.name} selects at layer {self.layer}, but the model has layers 0 to "
                f"{len(run.cache.layers) - 1}."
            )
        fusion = self._start(run, run.cache)
        layer = next((i for i in attending(run.cache.layers) if i >= self.layer), None)
        if layer is None:
            raise ValueError(
                f"{self.name} selects at layer {self.layer}, and none attends from there on."
            )
        fusion.select_at = SelectAt(layer, self.select)
        return Prepared(run.cache, fusion)

    def budget(self, layout: Layout) -> int:
        before_question = layout.n_tokens - layout.n_question
        return min(int(before_question * self.ratio), len(layout.chunk_positions))

    @abstractmethod
    def select(self, layout: Layout, fresh: States, stored: States) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order.

        Parameters
        ----------
        fresh : States
            The layer's states computed in this pass, all tokens.
        stored : States
            What the cache held for this layer, rotated into place; fresh tokens hold nothing
            meaningful there.
        """


@dataclass(frozen=True)
class QuestionSelector(Selector):
    """Selects by the question's attention to the loaded keys, before the pass begins.

    The fresh tokens alone are run over the loaded cache, and what the question attends to is added
    up. With ``alone`` the question has seen no chunk until then. ``pool`` is that of
    :class:`~a3_engine.fusion.attention_sums.AttentionSums`.
    """

    alone: ClassVar[bool] = False
    pool: ClassVar[Pool] = "mean"

    def _prepare(self, run: Run) -> Prepared:
        fusion, n_layers = self._start(run, run.cache), len(run.cache.layers)
        look = question_alone if self.alone else question_attention
        attend = attending(run.cache.layers)
        layers = [i for i in attend if i in self.layers(n_layers)] or attend[:1]
        decoder = run.model.get_decoder()
        attention = look(decoder, run.cache, fusion, run.ids, layers, self.pool)
        fusion.recompute(
            self.select(fusion.layout, attention),
            self.local_global(fusion.layout, attention, n_layers),
            Pruning(self.kept_per_layer(n_layers), self.pool),
        )
        return Prepared(run.cache, fusion)

    def layers(self, n_layers: int) -> range:
        """The layers whose attention is wanted; all of them unless a method says otherwise.

        Those of a hybrid model that have none are left out; the first that has is taken where none
        is left.
        """
        return range(n_layers)

    def kept_per_layer(self, n_layers: int) -> dict[int, float]:
        """Map of layer to the share of selected tokens still recomputed from that layer up.

        In ascending order from 1 on, the shares falling; see :mod:`a3_engine.fusion.layer_pruning`.
        """
        return {}

    def local_global(
        self, layout: Layout, attention: torch.Tensor, n_layers: int
    ) -> tuple[int, LocalGlobal] | None:
        """From which layer on the selected tokens attend to less than everything, and what.

        ``attention`` is that of :meth:`select`. None where they attend to everything.
        """
        return None

    @abstractmethod
    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        """Positions of chunk tokens, each once, in any order.

        Parameters
        ----------
        attention : torch.Tensor
            fp32, shape ``(layers, tokens)``: each wanted layer's attention weights, averaged over
            the heads, and over the question's tokens taken together as ``pool`` says.
        """


@dataclass(frozen=True)
class SparseSelector(Selector):
    """Keeps only some chunk tokens at all, computes those, and decodes on them.

    The question is run over the kept ends of the chunks alone, and the end of every chunk over its
    own chunk; their queries are compared. The ratio is the share of the
    prompt's tokens that stay; at 1.0 nothing is left out.
    """

    leaves_out: ClassVar[bool] = True
    n_local: int = 8

    def _prepare(self, run: Run) -> Prepared:
        if any(layer.is_sliding for layer in run.cache.layers):
            raise ValueError(
                f"{self.name} leaves tokens out, and the model's sliding windows count them. "
                "Choose another method for this model."
            )
        if len(attending(run.cache.layers)) < len(run.cache.layers):
            raise ValueError(
                f"{self.name} compares keys, and the model has layers without. Choose another "
                "method for this model."
            )
        if any(layer.shape.latent for layer in run.cache.layers):
            raise ValueError(
                f"{self.name} compares keys, and the model keeps latents of them. Choose another "
                "method for this model."
            )
        kept = self._kept(run)
        cache = run.cache.subset(kept, run.room)
        fusion = self._start(run, cache)
        fusion.recompute(kept[torch.isin(kept, run.layout.chunk_positions)])
        return Prepared(cache, fusion)

    def _kept(self, run: Run) -> torch.Tensor:
        """Sorted positions of the tokens that stay."""
        cache, layout, rotation = run.cache, run.layout, run.rotation
        layers = self.layers(len(cache.layers))
        local = run.local_queries(self.n_local, layers).transpose(0, 1).clone()
        background = cache.subset(layout.with_chunk_tokens(self.background(layout)))
        decoder = run.model.get_decoder()
        question = mean_queries(decoder, rotation, background, layout, run.ids, layers).clone()
        last = rotation.tables(torch.tensor([layout.n_tokens - 1]))
        keys = torch.stack([cache.layers[layer].stored()[0][0] for layer in layers])
        for mine, theirs, layer in zip(question, local, layers, strict=True):
            cos, sin = (table.to(mine.device) for table in last[layer])
            rotate_(mine[:, None], cos, sin)
            rotate_(theirs[:, :, None], cos, sin)
        return layout.with_chunk_tokens(self.select(layout, question, local, keys).cpu())

    @abstractmethod
    def layers(self, n_layers: int) -> range:
        """The layers whose queries are wanted."""

    @abstractmethod
    def background(self, layout: Layout) -> torch.Tensor:
        """Sorted positions of chunk tokens that stay in any case."""

    @abstractmethod
    def select(
        self, layout: Layout, question: torch.Tensor, local: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Positions of the chunk tokens that stay, the background among them, in any order.

        Parameters
        ----------
        question : torch.Tensor
            Mean query of the question, ``(layers, heads, head_dim)``.
        local : torch.Tensor
            Mean query of each chunk's last ``n_local`` tokens, ``(layers, chunks, heads,
            head_dim)``. All queries are rotated to the prompt's last position.
        keys : torch.Tensor
            The loaded keys, ``(layers, kv_heads, tokens, head_dim)``, rotated into place.
        """
