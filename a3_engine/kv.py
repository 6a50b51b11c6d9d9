"""What one chunk's KV is, in the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ChunkKV:
    """One chunk's keys, without position, and values.

    Parameters
    ----------
    keys : torch.Tensor
        Rotated to position 0, shape ``(layers, kv_heads, tokens, head_dim)``.
    values : torch.Tensor
        Same shape and dtype.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def kv_shape(decoder: PreTrainedModel, n_tokens: int) -> tuple[int, int, int, int]:
    """``(layers, kv_heads, tokens, head_dim)`` of the keys and values of so many tokens."""
    config = decoder.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return len(decoder.layers), config.num_key_value_heads, n_tokens, head_dim


def token_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, over all layers."""
    layers, kv_heads, _, head_dim = kv_shape(model.get_decoder(), 1)
    return 2 * layers * kv_heads * head_dim * model.dtype.itemsize
