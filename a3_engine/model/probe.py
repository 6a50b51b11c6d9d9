"""A text computed in several ways that must agree up to the model's own rounding.

How far rounding alone moves an outcome is measured by Monte Carlo arithmetic (Parker 1997, "Monte
Carlo Arithmetic"): the ordinary forward once more, with everything that enters a layer changed at
random by one unit of its dtype. A right fusion moves the outcome less than that, a wrong one more.
A wrong one moves most tokens, so their median is compared; in a mixture of experts, rounding sends
single tokens to other experts, which a median does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from a3_engine.errors import UnsupportedModelError
from a3_engine.kv import LayerShape
from a3_engine.model.attention import Captured, capture
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.kv_shape import kv_shape, ordinary_cache

TEXT = """The lighthouse stands on the northern shore, and its lamp burns through the night. Every \
evening the keeper climbs two hundred steps, fills the oil, trims the wick and writes the weather \
into a book. In 1874 a storm took the harbour wall; the fishing boats stayed in the bay for nine \
days, and nobody came to fetch the letters. "We have bread for a week," he wrote, "and wood enough \
for the stove." Later the railway reached the town, and with it came visitors who wanted to see \
the sea. Today a small engine turns the lens, a computer reports the wind, and the old book lies \
behind glass in the museum, open at the page of that storm."""

# Times the model's own rounding; a KL grows with the square of what moves it. Right fusions of real
# models (SmolLM2 135M, Gemma 3 270M) stay below 0.93 of either in every dtype; those of mixtures of
# few random experts come nearer.
STATES_FACTOR, KL_FACTOR = 3.0, 9.0
# What is granted at least: fp32 rounds the angles of position 1,000 to 1e-4.
LEAST_STATES, LEAST_KL = 1e-3, 1e-5
# And at most, since no wrong fusion could be told from a right one beyond.
MOST_STATES, MOST_KL = 0.25, 0.25


@dataclass(frozen=True)
class Outcome:
    """What a forward gave.

    Parameters
    ----------
    states : sequence of (keys, values)
        Of each layer, ``(1, kv_heads, tokens, head_dim)``.
    log_probs : torch.Tensor
        Of some tokens' predictions, ``(rows, vocabulary)``, fp64, on the CPU.
    """

    states: Sequence[tuple[torch.Tensor, torch.Tensor]]
    log_probs: torch.Tensor


class Probe:
    """The ordinary outcome of a text, and comparisons with it.

    Parameters
    ----------
    model : PreTrainedModel
        With the hooks of the fusion pass.
    ids : torch.Tensor
        Shape ``(1, tokens)``.
    rows : torch.Tensor
        Sorted positions, on the CPU, whose predictions may be compared.

    Attributes
    ----------
    windows : list of int or None
        The sliding window that each layer's attention is told of.

    Raises
    ------
    UnsupportedModelError
        The model's own predictions are not numbers.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.model, self.ids, self.rows = model, ids, rows
        self.windows: list[int | None] = []
        self.reference = self.ordinary(rows)
        if not self.reference.log_probs.isfinite().all():
            raise UnsupportedModelError(
                f"its own predictions are not numbers in {model.dtype}: give another dtype"
            )
        with _rounding(model.get_decoder(), self.windows):
            self._rounded = self.ordinary(rows)

    def ordinary(self, rows: torch.Tensor, start: int = 0) -> Outcome:
        """The model's own forward up to the last of these rows; its tokens begin at a position."""
        ids = self.ids[:, : int(rows[-1]) + 1]
        places = torch.arange(ids.shape[1], device=ids.device)[None] + start
        cache = ordinary_cache(self.model.get_decoder())
        logits = self.model(
            input_ids=ids,
            position_ids=places,
            **with_cache(self.model, cache),
            logits_to_keep=rows.to(ids.device),
        ).logits
        shapes = kv_shape(self.model.get_decoder()).layers
        states = [
            shape.ours(layer.keys, layer.values)
            if shape.heads
            else (logits.new_empty(1, 0, ids.shape[1], 0),) * 2
            for shape, layer in zip(shapes, cache.layers, strict=True)
        ]
        return Outcome(states, log_probs(logits[0]))

    def check(
        self, what: str, ours: Outcome, rows: torch.Tensor, other: Outcome | None = None
    ) -> None:
        """Compare an outcome with the reference, or with another one.

        Parameters
        ----------
        what : str
            Names the outcome in the error.
        ours, other : Outcome
            With the predictions of ``rows`` alone. States that are not there are not compared.
        rows : torch.Tensor
            Positions of the tokens that are compared.

        Raises
        ------
        UnsupportedModelError
            They differ by more than rounding; the message names the difference and what is allowed.
        """
        at = torch.searchsorted(self.rows, rows)
        expected = self.reference.log_probs[at]
        own = divergence(self._rounded.log_probs[at], expected)
        theirs = other or Outcome(self.reference.states, expected)
        layers = zip(
            ours.states, theirs.states, self.reference.states, self._rounded.states, strict=False
        )
        for index, (mine, yours, exact, rounded) in enumerate(layers):
            for kind, place in (("keys", 0), ("values", 1)):
                moved = distance(mine[place], yours[place], rows)
                allowed = STATES_FACTOR * distance(rounded[place], exact[place], rows)
                allowed = min(max(allowed, LEAST_STATES), MOST_STATES)
                if not moved <= allowed:  # NaN compares false: the gate stays closed
                    raise UnsupportedModelError(
                        f"{what}, {kind} of layer {index} differ by {moved:.2g} of their length, "
                        f"and {allowed:.2g} is allowed"
                    )
        kl = divergence(ours.log_probs, theirs.log_probs)
        allowed = min(max(KL_FACTOR * own, LEAST_KL), MOST_KL)
        if not kl <= allowed:
            raise UnsupportedModelError(
                f"{what}, predictions differ by a KL of {kl:.2g}, and {allowed:.2g} is allowed"
            )


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Of ``(rows, vocabulary)``, in fp64 on the CPU: in fp32 the sum may overflow."""
    return torch.log_softmax(logits.cpu().double(), dim=-1)


def divergence(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Median over rows of the KL divergence from the reference's predictions, in nats."""
    return float((reference.exp() * (reference - ours)).sum(-1).median())


def distance(ours: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor) -> float:
    """Median over tokens of how far their states are apart, relative to the states' length."""
    rows = rows.to(ours.device)
    ours, reference = ours[0, :, rows].float(), reference[0, :, rows].float()
    length = reference.norm(dim=(0, 2)).clamp(min=1e-12)
    return float(((ours - reference).norm(dim=(0, 2)) / length).median())


def _refuse_others(index: int, shape: LayerShape | None, captured: Captured) -> None:
    """A fused pass takes keys and values from where the attention is called."""
    keys, values = captured.kept
    given = (keys.shape[1], keys.shape[3], values.shape[3])
    if shape is None or shape.latent or given == shape[:3]:
        return
    heads, key_dim, value_dim = shape[:3]
    raise UnsupportedModelError(
        f"its layer {index} gives its attention other keys and values than it keeps: {given[0]} "
        f"heads of {given[1]} and {given[2]} numbers, and not {heads} of {key_dim} and {value_dim}"
    )


@contextmanager
def _rounding(decoder: PreTrainedModel, windows: list[int | None]) -> Iterator[None]:
    """Meanwhile all that enters a layer is rounded anew, at random; notes the layers' windows."""
    shapes = [shape for _, shape in zip_longest(decoder.layers, kv_shape(decoder).layers)]
    windows[:] = [None] * len(shapes)
    generator = torch.Generator().manual_seed(0)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        shape = shapes[index]  # none where it attends to what another layer keeps
        if shape is None or shape.attends:
            captured = capture(layer, args, kwargs)
            windows[index] = captured.window
            _refuse_others(index, shape, captured)
        states = args[0] if args else kwargs["hidden_states"]
        noise = torch.randn(states.shape, generator=generator).to(states.device)
        moved = states.float() * (1 + torch.finfo(states.dtype).eps / 2 * noise)
        moved = moved.to(states.dtype)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    handles = [
        layer.register_forward_pre_hook(partial(before, index=index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
