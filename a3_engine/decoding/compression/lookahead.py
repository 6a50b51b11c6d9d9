"""Lookahead queries: what a draft of the answer asks for (Lookahead Q-Cache, arXiv 2505.20334)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from a3_engine.fusion.cache import FusedCache
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.masks import RowMask


@torch.inference_mode()
def lookahead_queries(
    model: PreTrainedModel, cache: FusedCache, token: int, count: int
) -> list[torch.Tensor | None]:
    """Draft a few tokens greedily, take their queries, and forget them again.

    Parameters
    ----------
    cache : FusedCache
        Its prompt is complete. What the draft adds to it is cut off again.
    token : int
        The answer's first token.
    count : int
        Tokens to feed, ``token`` being the first; the draft ends early after an end token.

    Returns
    -------
    list of torch.Tensor or None
        Rotated queries of each layer, ``(1, heads, fed tokens, head_dim)``; None where a layer
        does not attend.
    """
    drafted: list[list[torch.Tensor]] = [[] for _ in cache.layers]

    def record(
        layer: int, query: torch.Tensor, key: torch.Tensor, rows: RowMask, scaling: float
    ) -> None:
        drafted[layer].append(query)

    eos = model.generation_config.eos_token_id if model.generation_config else None
    ends = eos if isinstance(eos, list) else [eos]
    device = model.get_input_embeddings().weight.device
    cache.observer = record
    try:
        for _ in range(count):
            logits = model(
                input_ids=torch.tensor([[token]], device=device), **with_cache(model, cache)
            ).logits
            if token in ends:
                break
            token = int(logits[0, -1].argmax())
    finally:
        cache.observer = None
        cache.crop(-max(map(len, drafted)))
    return [torch.cat(queries, dim=2) if queries else None for queries in drafted]
