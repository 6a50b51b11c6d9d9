"""Before the pass: run what each kind of selector looks at, and ask it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from a3_engine.devices import send
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fusion_pass import FusionPass, arguments
from a3_engine.fusion.lookahead import lookahead_queries
from a3_engine.fusion.scoring import question_alone, question_attention
from a3_engine.fusion.selectors.base import (
    LayerSelector,
    QuestionSelector,
    Selector,
    SparseSelector,
)
from a3_engine.fusion.sparse import sparse_positions
from a3_engine.layout import Layout
from a3_engine.model.masks import Observer
from a3_engine.model.rotary import Rotation


@torch.inference_mode()
def begin(
    model: PreTrainedModel,
    rotation: Rotation,
    cache: FusedCache,
    layout: Layout,
    selector: Selector,
    ids: Sequence[int],
    *,
    local_queries: Callable[[SparseSelector], torch.Tensor],
    room: int = 0,
    abandoned: Callable[[], bool] = lambda: False,
    observer: Observer | None = None,
) -> FusedCache:
    """Run what the selector needs, and hang the fusion pass on a cache.

    Parameters
    ----------
    cache : FusedCache
        Loaded, every layer pending.
    ids : sequence of int
        The prompt.
    local_queries : callable
        See :class:`~a3_engine.fusion.sparse.LocalQueries`; asked by sparse methods alone.
    room : int
        Slots for the answer.
    abandoned, observer
        See :class:`~a3_engine.fusion.fusion_pass.FusionPass`.

    Returns
    -------
    FusedCache
        The same, or a smaller one where the method leaves tokens out.

    Raises
    ------
    ValueError
        The method leaves tokens out, and the model has sliding windows.
    """
    kept, chunk_positions = None, layout.chunk_positions
    if isinstance(selector, SparseSelector) and layout.chunks and 0.0 < selector.ratio < 1.0:
        if any(layer.is_sliding for layer in cache.layers):
            raise ValueError(
                f"{selector.name} leaves tokens out, and the model's sliding windows count them. "
                "Choose another method for this model."
            )
        if any(layer.shape.latent for layer in cache.layers):
            raise ValueError(
                f"{selector.name} compares keys, and the model keeps latents of them. Choose "
                "another method for this model."
            )
        local = local_queries(selector)
        kept = sparse_positions(model, rotation, cache, layout, selector, ids, local)
        cache = cache.subset(kept, room)
    before_write = selector.before_write(layout, rotation, cache.devices)
    fusion = FusionPass(cache, layout, selector, abandoned, before_write, observer)
    layout = fusion.layout
    if fusion.selected is not None:
        return cache
    if kept is not None:
        fusion.take(kept[torch.isin(kept, chunk_positions)])
    elif isinstance(selector, QuestionSelector):
        look = question_alone if selector.alone else question_attention
        layers = selector.layers(len(cache.layers))
        attention = look(model.get_decoder(), cache, fusion, ids, layers, selector.pool)
        local_global = selector.local_global(layout, attention, len(cache.layers))
        fusion.take(selector.select(layout, attention), local_global)
    elif isinstance(selector, LayerSelector) and selector.drafted:
        device = model.get_input_embeddings().weight.device
        with fusion.only_fresh():
            prompt = send(torch.tensor([list(ids)]), device)
            logits = model(**arguments(model, prompt, cache), logits_to_keep=1).logits
        first = int(logits[0, -1].argmax())
        drafted = lookahead_queries(model, cache, first, selector.drafted)
        fusion.lookahead = drafted[selector.layer]
        cache.rewind()
    return cache
