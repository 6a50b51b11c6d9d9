"""The least that a pass needs: operations and bytes, and the seconds that a machine needs for them.

A pass computes rows at some positions of a prompt, in the upper layers perhaps fewer. Its linear
layers multiply every row with every weight; its attention multiplies each row with the keys and
values at positions not after its own:

    linear      2 * weights * rows                                 floating-point operations
    attention   4 * head_dim * heads * sum(position + 1)           of every layer
    logits      2 * hidden * vocabulary                            of the last row

Weights are read once, keys and values that some row attends to once, and new ones written once.
Norms, activations, softmax, rotation and embeddings are left out: the limit is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from a3_engine.model.masks import LocalGlobal


@dataclass(frozen=True)
class Shape:
    """What a decoder with gated MLPs is made of; ``windows`` has one entry a layer, 0 for none."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    windows: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """The shape that transformers' config describes."""
        text = config.get_text_config()
        heads, layers = text.num_attention_heads, text.num_hidden_layers
        window = getattr(text, "sliding_window", None) or 0
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
        return cls(
            layers,
            text.hidden_size,
            heads,
            text.num_key_value_heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.intermediate_size,
            text.vocab_size,
            tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linear maps: query, key, value, output, and three of the MLP."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def kv_elements(self) -> int:
        """Elements of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def weights(self) -> int:
        """All layers' and those of the logits."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary


class Part(NamedTuple):
    """Floating-point operations, and bytes between memory and processor."""

    flops: float
    nbytes: float

    def seconds(self, flops_s: float, bytes_s: float) -> float:
        """At these rates, computing and moving at once."""
        return max(self.flops / flops_s, self.nbytes / bytes_s)


@dataclass(frozen=True)
class Work:
    """What a pass needs."""

    linear: Part
    attention: Part
    logits: Part

    @property
    def flops(self) -> float:
        return self.linear.flops + self.attention.flops + self.logits.flops

    @property
    def nbytes(self) -> float:
        return self.linear.nbytes + self.attention.nbytes + self.logits.nbytes

    def seconds(self, matmul: float, copy: float, attention: float | None = None) -> float:
        """The three parts one after the other.

        Parameters
        ----------
        matmul, attention : float
            Floating-point operations a second; attention's are those of ``matmul`` where None.
        copy : float
            Bytes a second.
        """
        return (
            self.linear.seconds(matmul, copy)
            + self.attention.seconds(attention or matmul, copy)
            + self.logits.seconds(matmul, copy)
        )


def work(
    shape: Shape,
    rows: Sequence[torch.Tensor],
    element_bytes: int,
    local_global: tuple[int, LocalGlobal] | None = None,
) -> Work:
    """What a pass over these rows needs, after keys and values that are there already.

    Parameters
    ----------
    rows : sequence of torch.Tensor
        For each layer, sorted positions of the rows that it computes, at least one. All of a
        prompt's in all layers are a full prefill.
    element_bytes : int
        Of a weight, key or value.
    local_global : (int, LocalGlobal) or None
        From which layer on rows see less than everything before them, and what.
    """
    attended = seen = 0.0
    windows = shape.windows or (0,) * shape.layers
    for layer, (window, positions) in enumerate(zip(windows, rows, strict=True)):
        reach = window or float("inf")
        at = positions.to(torch.float64)
        steps = torch.diff(at, prepend=at.new_tensor([-1.0]))
        keys = (at + 1).clamp(max=reach)
        if local_global is not None and not window and layer >= local_global[0]:
            own = keys.clamp(max=local_global[1].window)
            shared = torch.searchsorted(
                local_global[1].global_positions.to(torch.float64), at + 1 - own
            )
            keys = torch.where(positions < local_global[1].dense_from, own + shared, keys)
        attended += float(keys.sum())
        seen += float(steps.clamp(max=reach).sum())  # keys that any row attends to
    n_rows, token = sum(len(positions) for positions in rows), shape.kv_elements * element_bytes
    logits = shape.hidden * shape.vocabulary
    return Work(
        linear=Part(
            2.0 * shape.layer_weights * n_rows, shape.layers * shape.layer_weights * element_bytes
        ),
        attention=Part(
            4.0 * shape.head_dim * shape.heads * attended,
            token * (seen + n_rows),
        ),
        logits=Part(2.0 * logits, logits * element_bytes),
    )
