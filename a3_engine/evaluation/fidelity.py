"""How far a method's answers are from a full prefill's, for the same token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.prompts import example_prompt
from a3_engine.fusion.cache import FusedCache
from a3_engine.method import Method
from a3_engine.model.hooks import arguments
from a3_engine.model.kv_shape import ordinary_cache
from a3_engine.segments import Prompt

ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Reference:
    """A full prefill of one prompt: its greedy answer and its distributions.

    ``log_probs`` has shape ``(ANSWER_TOKENS, vocabulary)``, fp32; ``gold_nll`` is the mean negative
    log-likelihood of the accepted answer's tokens, in nats; ``ttft_s`` the seconds of the prefill.
    """

    prompt: Prompt
    answer: list[int]
    log_probs: torch.Tensor
    gold: list[int]
    gold_nll: float
    ttft_s: float


@dataclass(frozen=True)
class Fidelity:
    """One method on one prompt, against the full prefill.

    ``kl_first`` and ``kl_answer``: Kullback-Leibler divergence from the full prefill's next-token
    distribution, in nats, at the first token and averaged over the full prefill's own greedy
    answer; ``agreement``: share of that answer's tokens that are the method's likeliest too;
    ``nll_change``: of the accepted answer, in nats a token, positive where it became less likely;
    ``kv_share``: bytes of the prompt's KV that decoding keeps, as a share of all; ``ttft_s``:
    seconds for loading, selecting and recomputing.
    """

    kl_first: float
    kl_answer: float
    agreement: float
    nll_change: float
    kv_share: float
    ttft_s: float


def full_prefill(engine: A3Engine, example: Example) -> Reference:
    """The reference of an example."""
    return reference_of(engine, example_prompt(engine, example), example.answers[0])


@torch.inference_mode()
def reference_of(engine: A3Engine, prompt: Prompt, accepted: str) -> Reference:
    """The reference of a prompt, with its accepted answer."""
    gold = list(engine.runtime.planner.tokenize_text(accepted))
    cache = ordinary_cache(engine.runtime.model.get_decoder())
    started = time.perf_counter()
    logits = _forward(engine, prompt.ids, cache)[-1:]
    seconds = time.perf_counter() - started
    nll = _gold_nll(engine, cache, logits, gold)
    answer, rows = [], [logits]
    for _ in range(ANSWER_TOKENS):
        answer.append(int(rows[-1][-1].argmax()))
        if len(answer) < ANSWER_TOKENS:
            rows.append(_forward(engine, answer[-1:], cache))
    log_probs = torch.log_softmax(torch.cat(rows).float(), dim=-1)
    return Reference(prompt, answer, log_probs, gold, nll, seconds)


@torch.inference_mode()
def fidelity(engine: A3Engine, reference: Reference, method: Method) -> Fidelity:
    """Compare a method with the reference; its chunks should be stored already."""
    cache, first, seconds = _fused(engine, reference.prompt, method, 2 * ANSWER_TOKENS)
    nll = _gold_nll(engine, cache, first, reference.gold)
    rest = _forward(engine, reference.answer[:-1], cache)
    log_probs = torch.log_softmax(torch.cat([first, rest]).float(), dim=-1)
    kl = (reference.log_probs.exp() * (reference.log_probs - log_probs)).sum(-1)
    same = log_probs.argmax(-1) == torch.tensor(reference.answer, device=log_probs.device)
    return Fidelity(
        kl_first=float(kl[0]),
        kl_answer=float(kl.mean()),
        agreement=float(same.float().mean()),
        nll_change=nll - reference.gold_nll,
        kv_share=cache.prompt_nbytes / (cache.token_nbytes * reference.prompt.n_tokens),
        ttft_s=seconds,
    )


@torch.inference_mode()
def answer_nll(engine: A3Engine, prompt: Prompt, answer: str, method: Method) -> float:
    """Mean negative log-likelihood of an answer's tokens after a prompt, in nats."""
    gold = list(engine.runtime.planner.tokenize_text(answer))
    cache, first, _ = _fused(engine, prompt, method, len(gold))
    return _gold_nll(engine, cache, first, gold)


def _fused(
    engine: A3Engine, prompt: Prompt, method: Method, room: int
) -> tuple[FusedCache, torch.Tensor, float]:
    """The cache that decoding goes on with, the first token's logits, and the seconds to them."""
    started = time.perf_counter()
    _, cache = engine.prepare(
        prompt, selector=method.selector, compression=method.compression, room=room
    )
    first = _forward(engine, prompt.ids, cache)[-1:]
    seconds = time.perf_counter() - started
    if cache.compressor is not None:
        cache.compressor.compress(engine.runtime.model, cache, int(first[-1].argmax()))
    return cache, first, seconds


def _forward(engine: A3Engine, ids: Sequence[int], cache: Cache) -> torch.Tensor:
    """Logits after these tokens, shape ``(tokens or 1, vocabulary)``; a prompt gives one row."""
    model = engine.runtime.model
    device = model.get_input_embeddings().weight.device
    keep = 1 if cache.get_seq_length() == 0 else 0
    tokens = torch.tensor([list(ids)], device=device)
    logits = model(**arguments(model, tokens, cache), logits_to_keep=keep).logits[0]
    logits[-1, 0].item()  # waits for the device, so that a caller's clock is right
    return logits


def _gold_nll(engine: A3Engine, cache: Cache, first: torch.Tensor, gold: list[int]) -> float:
    """Mean negative log-likelihood of the gold tokens; the cache is left as it was."""
    logits = first
    if len(gold) > 1:
        logits = torch.cat([first, _forward(engine, gold[:-1], cache)])
        cache.crop(-(len(gold) - 1))
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor(gold, device=log_probs.device)
    return -float(log_probs.gather(1, targets[:, None]).mean())
