"""Answers on a cache, in steps shared with other requests, or by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from a3_engine.decoding.active_request import ActiveRequest
from a3_engine.decoding.batching import BatchedDecoder
from a3_engine.decoding.grammar import FollowGrammar
from a3_engine.decoding.logprobs import RecordLogprobs
from a3_engine.decoding.sampling import Sampling
from a3_engine.decoding.text_emitter import TextEmitter
from a3_engine.devices import input_device
from a3_engine.fusion.cache import FusedCache


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    cache: Cache | None,
    sampling: Sampling,
    emitter: TextEmitter,
    abandoned: Callable[[], bool],
    decoder: BatchedDecoder,
    recorder: RecordLogprobs | None = None,
) -> str:
    """Generate an answer to the prompt ``ids`` and return why it ended.

    The prefill with a pending `FusedCache` is the fusion pass; its compressor cuts it after the
    first token. Without a cache the model, whatever its kind, answers by transformers' `generate`.
    A recorder takes down log probabilities.

    Returns
    -------
    str
        ``"stop"`` (end token or stop string), ``"length"``, or ``"abandoned"``.
    """
    eos = decoder.settings.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    ends = eos if isinstance(eos, list) else [eos]
    before: list[LogitsProcessor] = [] if recorder is None else [recorder]
    if sampling.grammar is not None:
        before.append(FollowGrammar(tokenizer, sampling.grammar, ends))
    processors = sampling.processors(before)
    if cache is not None:
        if isinstance(cache, FusedCache) and cache.fusion is not None:
            cache.fusion.last_token_only = True
        request = ActiveRequest(model, ids, cache, sampling, processors, ends, emitter, abandoned)
        decoder.run(request)
        emitter.end()
        return str(request.reason)

    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        **({"do_sample": True, "top_k": 0} if sampling.temperature > 0 else {"do_sample": False}),
        eos_token_id=ends,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    inputs = torch.tensor([list(ids)], device=input_device(model))
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(inputs),
        "generation_config": config,
        "logits_processor": processors,
        "stopping_criteria": StoppingCriteriaList([_Follow(emitter, abandoned)]),
    }

    def generate() -> torch.Tensor:
        # transformers fills what a request leaves open from the model's own settings, also where
        # the request leaves it off.
        model.generation_config = GenerationConfig()
        devices = [inputs.device] if inputs.is_cuda else []
        try:
            with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                return model.generate(inputs, **options)
        finally:
            model.generation_config = decoder.settings

    output = decoder.executor.run(generate)
    emitter.end()
    if abandoned():
        return "abandoned"
    return "stop" if emitter.stopped or int(output[0, -1]) in ends else "length"


class _Follow(StoppingCriteria):
    """Hands every new token to the emitter; ends what met a stop string or is abandoned.

    transformers calls its streamer only after the criteria, one token too late for stop strings.
    """

    def __init__(self, emitter: TextEmitter, abandoned: Callable[[], bool]) -> None:
        self._emitter = emitter
        self._abandoned = abandoned

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._emitter.put(int(input_ids[0, -1]))
        halt = self._emitter.stopped or self._abandoned()
        return torch.full((input_ids.shape[0],), halt, device=input_ids.device)
