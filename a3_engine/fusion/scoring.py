"""What the question attends to: one cheap pass of the fresh tokens over the loaded cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.fuse import FusionPass
from a3_engine.fusion.layout import Layout


class AttentionSums:
    """Collects the question's attention weights, layer by layer.

    Parameters
    ----------
    layout : Layout
        Its fresh tokens are the rows of the pass; those of the question are looked at.
    layers : range
        The layers to look at.
    """

    def __init__(self, layout: Layout, layers: range) -> None:
        self._layers = layers
        self._index = torch.searchsorted(layout.fresh, layout.question)
        # Causal within the question only: its words may also stand ahead of the documents.
        self._first = int(layout.question[0])
        where = torch.arange(self._first, layout.n_tokens)
        self._after = torch.isin(where, layout.question) & (where > layout.question[:, None])
        self.by_layer: list[torch.Tensor] = []

    def observe(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> None:
        """Add one layer; query and key as the attention function gets them."""
        if module.layer_idx not in self._layers:
            return
        kv_heads, n_tokens, head_dim = key.shape[1:]
        question = query[0, :, self._index.to(query.device)] * scaling
        group, n_question = question.shape[0] // kv_heads, question.shape[1]
        scores = torch.matmul(
            question.reshape(kv_heads, group * n_question, head_dim), key[0].transpose(1, 2)
        )
        scores.view(kv_heads, group, n_question, n_tokens)[..., self._first :].masked_fill_(
            self._after.to(scores.device), float("-inf")
        )
        weights = torch.softmax(scores, dim=-1)
        self.by_layer.append(weights.mean(dim=(0, 1), dtype=torch.float32))


@torch.inference_mode()
def question_attention(
    decoder: PreTrainedModel,
    cache: FusedCache,
    fusion: FusionPass,
    ids: Sequence[int],
    layers: range,
) -> torch.Tensor:
    """The question's attention to every token, shape ``(layers, tokens)``, fp32.

    The cache is pending again afterwards; the fresh tokens that this pass wrote are written anew
    by the fusion pass.
    """
    sums = AttentionSums(fusion.layout, layers)
    with fusion.only_fresh(sums.observe):
        device = decoder.get_input_embeddings().weight.device
        decoder(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache)
    cache.rewind()
    return torch.stack([row.to(sums.by_layer[0].device) for row in sums.by_layer])
