"""How an answer's tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

WHOLE = {"max_new_tokens", "top_k", "logprobs", "seed"}
MOST_LOGPROBS = 1000


def number(name: str, value: object, *, whole: bool = False) -> float:
    """A setting that is a finite number, of whatever library; raises `TypeError`, `ValueError`."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {kind}, not {value!r:.40}.")
    try:
        read: float = int(value) if whole else float(value)  # type: ignore[call-overload]
        exact = not whole or bool(read == value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} is {kind}, not {value!r:.40}: {error}.") from error
    if not exact or not math.isfinite(read):
        raise ValueError(f"{name} is {kind}, not {value!r:.40}.")
    return read


def strings(name: str, stop: object) -> tuple[str, ...]:
    """A setting that is a list of texts, one text, or None, which is none."""
    if stop is None:
        return ()
    texts = (stop,) if isinstance(stop, str) else stop
    found = tuple(texts) if isinstance(texts, Iterable) else (None,)
    if not all(isinstance(text, str) for text in found):
        raise TypeError(f"{name} is a text or a list of texts, not {stop!r:.40}.")
    return found


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy.

    Parameters
    ----------
    max_new_tokens : int
        Upper bound of the answer's length.
    temperature : float
        0 picks the likeliest token; above, the distribution is sampled.
    top_p, top_k : float, int or None
        Restrict sampling; None is off.
    repetition_penalty : float
        1.0 is off.
    stop : tuple of str
        The answer ends before the first of these.
    grammar : str or None
        What the answer must follow; see :class:`~a3_engine.decoding.grammar.FollowGrammar`.
    shown : tuple of str
        Control tokens that count as text of the answer, such as the marks of tool calls.
    seed : int or None
        Of the random numbers: the same request with the same seed has the same answer. Where None,
        torch's own seed decides, and a request that comes again has other numbers.
    logprobs : int or None
        How many of the likeliest tokens are reported in each place, beside the answer's own; see
        :class:`~a3_engine.decoding.logprobs.RecordLogprobs`. None reports nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    logprobs: int | None = None
    seed: int | None = None
    shown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Read what callers give: None is a setting's default, and one string is one stop."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                value = field.default
            elif field.name in ("stop", "shown"):
                value = strings(field.name, value)
            elif field.name == "grammar":
                if not isinstance(value, str):
                    raise TypeError(f"grammar is a text, not {type(value).__name__}.")
            else:
                whole = field.name in WHOLE
                value = number(field.name, value, whole=whole)
            object.__setattr__(self, field.name, value)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, as {self.temperature} is.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p lies above 0 and up to 1, not at {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs lies from 0 to {MOST_LOGPROBS}, not at {self.logprobs}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit into 64 bits, which {self.seed} does not.")

    def processors(self, before_sampling: Sequence[LogitsProcessor]) -> LogitsProcessorList:
        """What logits go through, in transformers' order, with a request's own in their place."""
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            steps.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        steps += before_sampling
        if self.temperature > 0:
            steps.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k is not None:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None and self.top_p < 1.0:
                steps.append(TopPLogitsWarper(self.top_p))
        return steps


def draw(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index of each row, ``(rows, 1)``, by these probabilities, ``(rows, vocabulary)``.

    The random numbers are the generator's, which is of their device; torch's own where None.

    On a CPU by inversion: `torch.multinomial` takes a random number for every token of the
    vocabulary, there the longest part of choosing one.

    Raises
    ------
    RuntimeError
        They are no probabilities, since the model's logits were not finite.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)
    totals = probabilities.double().cumsum(dim=-1)
    if not totals[:, -1].isfinite().all():
        raise RuntimeError("No token can be drawn: the model's logits are not finite.")
    # Above 0, so that nothing impossible is drawn, and up to the total.
    chance = 1 - torch.rand(len(totals), 1, dtype=totals.dtype, generator=generator)
    return torch.searchsorted(totals, chance * totals[:, -1:])
