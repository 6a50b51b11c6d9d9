"""Answers by transformers' own `generate`, on a fused cache or by ordinary prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from a3_engine.decoding.grammar import FollowGrammar
from a3_engine.decoding.logprobs import RecordLogprobs
from a3_engine.decoding.streaming import TextEmitter
from a3_engine.fusion.cache import FusedCache


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

    def __post_init__(self) -> None:
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
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must not be negative, as {self.logprobs} is.")

    def config(self, eos_token_id: Any, pad_token_id: int | None) -> GenerationConfig:
        """The same in transformers' terms."""
        values: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            values |= {
                "temperature": self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": 0 if self.top_k is None else self.top_k,
            }
        return GenerationConfig(**values)


class _Follow(StoppingCriteria):
    """Hands every new token to the emitter; ends what met a stop string or is abandoned.

    transformers calls its streamer only after the criteria, one token too late for stop strings.
    """

    def __init__(
        self,
        emitter: TextEmitter,
        abandoned: Callable[[], bool],
        after_first: Callable[[int], None] | None,
    ) -> None:
        self._emitter = emitter
        self._abandoned = abandoned
        self._after_first = after_first

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self._emitter.put(token)
        halt = self._emitter.stopped or self._abandoned()
        if self._after_first is not None and not halt:
            self._after_first(token)
            self._after_first = None
        return torch.full((input_ids.shape[0],), halt, device=input_ids.device)


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the model has no generation settings of its own.

    transformers fills what a request leaves open from them, also where the request leaves it off.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    cache: Cache | None,
    sampling: Sampling,
    emitter: TextEmitter,
    abandoned: Callable[[], bool],
    recorder: RecordLogprobs | None = None,
) -> str:
    """Generate an answer to the prompt ``ids`` and return why it ended.

    A pending `FusedCache` makes the prefill of `generate` the fusion pass; its compressor cuts it
    behind the first token. None is ordinary prefill. A recorder takes down log probabilities.

    Returns
    -------
    str
        ``"stop"`` (end token or stop string), ``"length"``, or ``"abandoned"``.
    """
    device = model.get_input_embeddings().weight.device
    inputs = torch.tensor([list(ids)], device=device)
    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    ends = eos if isinstance(eos, list) else [eos]
    extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    processors: list[LogitsProcessor] = [] if recorder is None else [recorder]
    if sampling.grammar is not None:
        processors.append(FollowGrammar(tokenizer, sampling.grammar, ends))
    compress = None
    if isinstance(cache, FusedCache) and cache.compressor is not None:
        compress = partial(cache.compressor.compress, model, cache)
    with _without_own_defaults(model):
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=sampling.config(eos, pad),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([_Follow(emitter, abandoned, compress)]),
            **extra,
        )
    emitter.end()
    if abandoned():
        return "abandoned"
    ended = emitter.stopped or int(output[0, -1]) in ends
    return "stop" if ended else "length"
