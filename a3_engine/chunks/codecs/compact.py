"""A tenth of bf16: what a model's other layers do not tell already, in whole steps, entropy coded.

As KVTC does (arXiv:2511.01815), keys and values are turned to the axes of their principal
components, rounded to steps of one size, and coded by frequencies that were counted before. Layers
say much of each other: KVTC takes many layers' components together. Here a layer's keys are first
guessed from the keys of the layer below, and its values from its keys and the values below, by
linear maps; only the rest is turned and coded. That takes matrices of one layer's width.

A guess is made of what decoding gives, so that errors do not add up from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from a3_engine.chunks.codecs import coder
from a3_engine.chunks.codecs.base import ANY, Spec, Tensors
from a3_engine.kv import ChunkKV, Shape

BASIS = "basis"
# The step of each strength, where a layer's keys, and its values, have a mean square of 1.
STRENGTHS = {"compact": 0.5, "compact-small": 0.8}
# Numbers this far beyond half a step are rounded towards 0: fewer bits for the same error.
SHY = 0.1
TABLES = 56
UNMET = 1.15  # bytes of texts that were not calibrated on, beside those that were
LARGEST = 2**24  # of a coded number: all below are exact in fp32


class CompactFormat:
    """What `coder` makes of a chunk, and numbers beyond its tables with their places."""

    by_layer = False

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        rows, heads, n_tokens, key_dim = keys
        numbers = rows * heads * n_tokens * (key_dim + values[3])
        lanes = min(coder.LANES, n_tokens)
        return {
            "states": Spec((coder.STREAMS, lanes), torch.int32),
            "words": Spec((ANY,), torch.int16, most=numbers + coder.STREAMS),
            "ends": Spec((coder.STREAMS,), torch.int64),
            "outlier_at": Spec((ANY,), torch.int64, most=numbers),
            "outlier": Spec((ANY,), torch.int32, most=numbers),
        }


class BasisFormat:
    """What the codec knows of a model: maps, axes, sizes and frequencies."""

    by_layer = False

    def layout(self, keys: Shape, values: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        rows, (key, value) = keys[0], (shape[1] * shape[3] for shape in (keys, values))
        sizes = {
            "key_axes": (key, key),
            "key_before": (key, key),
            "value_axes": (value, value),
            "value_before": (value, value),
            "value_beside": (key, value),
        }
        specs = {name: Spec((rows, *size), torch.float16) for name, size in sizes.items()}
        for name, size in (("key", key), ("value", value)):
            specs[f"{name}_mean"] = Spec((rows, size), torch.float32)
            specs[f"{name}_scale"] = Spec((rows, 1), torch.float32)
            specs[f"{name}_table"] = Spec((rows, size), torch.uint8)
        specs["counts"] = Spec((TABLES, coder.SYMBOLS), torch.int16)
        specs["token_nbytes"] = Spec((1,), torch.float32)
        return specs


def is_sound(basis: Tensors) -> bool:
    """Whether tensors of the basis' layout can be one."""
    counts = basis["counts"].int()
    return bool(
        all(tensor.isfinite().all() for tensor in basis.values())
        and all((basis[f"{kind}_scale"] > 0).all() for kind in ("key", "value"))
        and all((basis[f"{kind}_table"] < TABLES).all() for kind in ("key", "value"))
        and (counts >= 0).all()
        and ((counts > 0).sum(1) > 1).all()
        and (counts[:, coder.REACH] > 0).all()
        and (counts.sum(1) == coder.TOTAL).all()
    )


def rounded(steps: torch.Tensor) -> torch.Tensor:
    """To whole steps, a little towards 0."""
    whole = steps.abs().add_(0.5 - SHY).floor_().clamp_(max=LARGEST)
    return whole * steps.sign()


@dataclass(frozen=True)
class States:
    """A layer's keys and values as they are decoded, scaled; ``(tokens, heads * head_dim)``."""

    key: torch.Tensor
    value: torch.Tensor


class Maps:
    """A basis as it is used, on one device and in fp32."""

    def __init__(self, basis: Tensors, step: float, device: torch.device) -> None:
        of = {n: t.to(device, torch.float32) for n, t in basis.items() if not n.endswith("_table")}
        self.step = step
        self.mean = {kind: of[f"{kind}_mean"] for kind in ("key", "value")}
        self.scale = {kind: of[f"{kind}_scale"] for kind in ("key", "value")}
        self.axes = {kind: of[f"{kind}_axes"] for kind in ("key", "value")}
        self.back = {kind: step * axes.transpose(1, 2) for kind, axes in self.axes.items()}
        self.before = {kind: of[f"{kind}_before"] for kind in ("key", "value")}
        self.beside = of["value_beside"]

    def guess(self, kind: str, row: int, below: States | None, key: torch.Tensor) -> torch.Tensor:
        """What is known of a layer's keys or values before they are decoded.

        ``key`` are this layer's, for its values.
        """
        beside = key @ self.beside[row] if kind == "value" else None
        if below is None:
            return beside if beside is not None else torch.zeros_like(key)
        last = getattr(below, kind)
        return (
            last @ self.before[kind][row]
            if beside is None
            else torch.addmm(beside, last, self.before[kind][row])
        )

    def scaled(self, kind: str, row: int, states: torch.Tensor) -> torch.Tensor:
        """Of ``(heads, tokens, head_dim)``."""
        flat = states.transpose(0, 1).flatten(1).float()
        return torch.nan_to_num((flat - self.mean[kind][row]) / self.scale[kind][row])

    def numbers(self, kind: str, row: int, rest: torch.Tensor) -> torch.Tensor:
        """What a guess has left, as whole steps."""
        return rounded(rest @ self.axes[kind][row] / self.step)

    def plain(self, kind: str, row: int, scaled: torch.Tensor, into: torch.Tensor) -> None:
        """The inverse of `scaled`."""
        flat = torch.addcmul(self.mean[kind][row], scaled, self.scale[kind][row])
        into.copy_(flat.view(len(flat), into.shape[0], -1).transpose(0, 1))


class Compact:
    """One model's keys and values, by a basis that was calibrated to it.

    The root mean square error of a token's keys, and of its values, in a layer is at most
    ``step * (0.5 + SHY)`` of that layer's scale in the basis, and what fp16 takes from the axes.

    Parameters
    ----------
    name : str
        One of `STRENGTHS`.
    basis : dict of torch.Tensor
        Of `BasisFormat`, and sound.
    digest : str
        Of the basis.
    """

    def __init__(self, name: str, basis: Tensors, digest: str) -> None:
        self.name, self.step, self._digest = name, STRENGTHS[name], digest
        self.basis = {name: tensor.clone() for name, tensor in basis.items()}
        self._maps: dict[torch.device, Maps] = {}
        columns = torch.cat([basis["key_table"], basis["value_table"]], dim=1).flatten()
        self._tables = coder.Tables(basis["counts"], columns)

    @property
    def identity(self) -> str:
        return f"{self.name} {self._digest}"

    def nbytes(self, keys: Shape, values: Shape, dtype: torch.dtype) -> int:
        lanes = coder.STREAMS * min(coder.LANES, keys[2]) * 4
        return int(keys[2] * UNMET * self.basis["token_nbytes"].item()) + lanes

    def encode(self, kv: ChunkKV) -> Tensors:
        numbers = []
        below, maps = None, self._on(kv.keys.device)
        for row, states in enumerate(zip(kv.keys, kv.values, strict=True)):
            done: list[torch.Tensor] = []
            for kind, exact in zip(("key", "value"), states, strict=True):
                exact = maps.scaled(kind, row, exact)
                guess = maps.guess(kind, row, below, done[0] if done else exact)
                steps = maps.numbers(kind, row, exact - guess)
                numbers.append(steps.T.int())
                done.append(torch.addmm(guess, steps, maps.back[kind][row]))
            below = States(*done)
        all_numbers = torch.cat(numbers).cpu()
        most = self._tables.most[:, None]
        outlier = all_numbers.abs() > most
        coded = coder.encode(all_numbers.clamp(-most, most), self._tables)
        return {
            **coded._asdict(),
            "outlier_at": outlier.flatten().nonzero()[:, 0],
            "outlier": all_numbers[outlier],
        }

    def decode(self, tensors: Tensors, keys: Shape, values: Shape, dtype: torch.dtype) -> ChunkKV:
        device = tensors["words"].device
        kv = ChunkKV(*(torch.empty(s, dtype=dtype, device=device) for s in (keys, values)))
        below, maps = None, self._on(device)
        lines = self._numbers(tensors, keys[2], (keys[1] * keys[3], values[1] * values[3]))
        for row, into in enumerate(zip(kv.keys, kv.values, strict=True)):
            done: list[torch.Tensor] = []
            for kind, place in zip(("key", "value"), into, strict=True):
                steps = next(lines).to(device)
                guess = maps.guess(kind, row, below, done[0] if done else steps)
                done.append(torch.addmm(guess, steps, maps.back[kind][row]))
                maps.plain(kind, row, done[-1], place)
            below = States(*done)
        return kv

    def _numbers(
        self, tensors: Tensors, n_tokens: int, sizes: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """Each layer's keys' and values' in turn, ``(tokens, size)``."""
        parts = {name: tensor.cpu() for name, tensor in tensors.items()}
        coded = coder.Coded(*(parts[name] for name in coder.Coded._fields))
        numbers = coder.decode(coded, self._tables, n_tokens)
        count = min(len(parts["outlier_at"]), len(parts["outlier"]))
        at, outlier = parts["outlier_at"][:count], parts["outlier"][:count]
        inside = (at >= 0) & (at < numbers.numel())  # unless a stranger sealed it
        numbers.view(-1)[at[inside]] = outlier[inside].float()
        for line in torch.split(numbers, [*sizes] * (len(numbers) // sum(sizes))):
            yield line.T

    def _on(self, device: torch.device) -> Maps:
        if device not in self._maps:
            self._maps[device] = Maps(self.basis, self.step, device)
        return self._maps[device]
