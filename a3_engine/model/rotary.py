"""Moving keys between positions.

A rotary position embedding turns each pair of key components by ``position * inv_freq``. Turning a
key by a further angle therefore moves it to another position, exactly up to rounding (FusionRAG,
arXiv 2601.12904, appendix A.1). The constant ``attention_scaling`` of yarn and longrope stays in
the stored key: only the pure rotation is applied here, so it is never applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel

from a3_engine.devices import send
from a3_engine.errors import UnsupportedModelError
from a3_engine.model.kv_shape import kv_shape

Tables = list[tuple[torch.Tensor, torch.Tensor]]  # cosines and sines of each layer


@dataclass(frozen=True)
class Rotation:
    """The rotary parameters of a decoder, one row a layer.

    Parameters
    ----------
    inv_freq : sequence of torch.Tensor
        Of each layer fp32, shape ``(rotary_dim / 2,)``, on the CPU. A layer without position (NoPE)
        has zeros: turning by nothing. One without keys has none.
    max_tokens : int or None
        Longest prompt for which these frequencies hold (longrope changes them beyond it).
    adjacent : bool
        Whether the two components of a pair lie side by side, as in GLM-4, or half of the turned
        components apart, as in Llama.
    """

    inv_freq: Sequence[torch.Tensor]
    max_tokens: int | None = None
    adjacent: bool = False
    _last: list[Tables] = field(default_factory=list, repr=False, compare=False)

    def tables_up_to(self, n_tokens: int, devices: Sequence[torch.device]) -> Tables:
        """:meth:`tables` before ``n_tokens`` at least; the last ones are remembered."""
        for known in self._last:
            if len(known[0][0]) >= n_tokens and [cos.device for cos, _ in known] == devices:
                return known
        # A prompt that is longer by a few tokens wants no new ones.
        tables = self.tables(torch.arange(1 << (n_tokens - 1).bit_length()), devices)
        self._last[:] = [tables]
        return tables

    def tables(
        self, positions: torch.Tensor, devices: Sequence[torch.device] | None = None
    ) -> Tables:
        """Cosines and sines for every layer; layers of equal frequencies share one pair.

        Parameters
        ----------
        positions : torch.Tensor
            Integer positions, shape ``(tokens,)``.
        devices : sequence of torch.device or None
            Where each layer wants its pair, which layers of one device share; the positions' own
            device where None.

        Returns
        -------
        list of (cos, sin), each fp32 of shape ``(tokens, rotary_dim / 2)``, or
        ``(tokens, rotary_dim / 2, 1)`` for adjacent pairs
        """
        shared: dict[tuple[bytes, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        tables = []
        homes = devices or [positions.device] * len(self.inv_freq)
        for row, home in zip(self.inv_freq, homes, strict=True):
            identity = (row.numpy().tobytes(), home)
            if identity not in shared:
                # The same expression as in transformers' rotary modules, so that the rounding of
                # the angle is the same and cancels.
                angles = send(positions, home)[:, None].float() * send(row, home)
                angles = angles[..., None] if self.adjacent else angles
                shared[identity] = (angles.cos(), angles.sin())
            tables.append(shared[identity])
        return tables


def rotate_(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    compute: torch.dtype = torch.float32,
) -> None:
    """Turn ``keys`` in place.

    Parameters
    ----------
    keys : torch.Tensor
        Shape ``(..., tokens, head_dim)``; components beyond ``rotary_dim`` stay as they are.
    cos, sin : torch.Tensor
        One layer's pair from :meth:`Rotation.tables`; its shape says where pairs lie.
    inverse : bool
        Turn back to position 0 instead of away from it.
    compute : torch.dtype
        Precision of the arithmetic; keys themselves need fp32.
    """
    adjacent = cos.dim() == 3
    if adjacent:
        cos, sin = cos[..., 0], sin[..., 0]
    half = cos.shape[-1]
    cos, sin = cos.to(compute), (-sin if inverse else sin).to(compute)
    states = keys[..., : 2 * half].to(compute)
    turned = torch.empty_like(states)
    first, second = _halves(states, adjacent)
    turned_first, turned_second = _halves(turned, adjacent)
    torch.mul(first, cos, out=turned_first)
    torch.mul(second, cos, out=turned_second)
    turned_first.addcmul_(second, sin, value=-1)
    turned_second.addcmul_(first, sin)
    keys[..., : 2 * half] = turned


def _halves(states: torch.Tensor, adjacent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second components of all pairs, as views."""
    if adjacent:
        return states[..., 0::2], states[..., 1::2]
    half = states.shape[-1] // 2
    return states[..., :half], states[..., half:]


def read_rotation(decoder: PreTrainedModel) -> Rotation:
    """Read a decoder's rotary frequencies; how its layers turn by them, the gate finds out.

    Raises
    ------
    UnsupportedModelError
        The decoder has no rotary embedding, or one whose frequencies depend on the prompt's length.
    """
    shapes = kv_shape(decoder).layers
    rotary = next((part for part in decoder.children() if _frequencies(part)), None)
    if rotary is None and any(shape.folds for shape in shapes):  # these know the order of tokens
        return Rotation([torch.zeros(0)] * len(decoder.layers))
    if rotary is None:
        raise UnsupportedModelError(
            "the model has no rotary position embedding (ALiBi, learned or no positions)"
        )
    config = decoder.config
    layer_types = getattr(config, "layer_types", None) or [None] * len(decoder.layers)
    parameters = config.rope_parameters or {}
    per_type = {
        kind: parameters[kind]
        for kind in set(layer_types)
        if isinstance(parameters.get(kind), dict)
    }

    rows, max_tokens = [], None
    for kind, shape in zip_longest(layer_types, shapes):
        if shape is not None and not shape.attends:
            rows.append(torch.zeros(0))
            continue
        rope = per_type.get(kind, parameters)
        rope_type = rope.get("rope_type", "default")
        if rope_type == "dynamic":
            raise UnsupportedModelError(
                "dynamic NTK rope changes its frequencies with the prompt's length"
            )
        if rope_type == "longrope":
            max_tokens = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
        rows.append(_inv_freq(rotary, kind if per_type else None))
    return Rotation(rows, max_tokens)


def _frequencies(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]


def _inv_freq(rotary: nn.Module, layer_type: str | None) -> torch.Tensor:
    """The untouched frequencies: `original_inv_freq` survives the in-place updates of longrope."""
    prefix = f"{layer_type}_" if layer_type else ""
    for name in (f"{prefix}original_inv_freq", f"{prefix}inv_freq"):
        value = getattr(rotary, name, None)
        if isinstance(value, torch.Tensor):
            return value.detach().float().cpu()
    raise UnsupportedModelError(f"its rotary module {type(rotary).__name__} shows no frequencies")
