"""Answers that follow a grammar: of all tokens, only those that it allows next can be chosen."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from a3_engine.processes import Lock

_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, Any]] = WeakKeyDictionary()
_lock = Lock()


class FollowGrammar(LogitsProcessor):
    """Rules out every token that the grammar does not allow; one object serves one answer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    grammar : str
        In llguidance's variant of Lark, e.g. ``start: %json {"type": "object"}``.
    ends : list of int
        Tokens that end the answer; allowed as soon as the grammar is satisfied.

    Raises
    ------
    ImportError
        llguidance is not installed.
    ValueError
        The grammar is wrong, or says what llguidance cannot follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, grammar: str, ends: list[int]) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ImportError(
                "Forced tool calls and JSON answers need llguidance. Run: "
                "pip install 'a3-integrations[structured]'"
            ) from error
        self._matcher = LLMatcher(_vocabulary(tokenizer, ends), grammar, log_level=0)
        self._started = False
        if self._matcher.is_error():
            raise ValueError(f"The grammar cannot be followed: {self._matcher.get_error()}")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._started:
            self._matcher.consume_token(int(input_ids[0, -1]))
        self._started = True
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        ruled_out = torch.ones(scores.shape[-1], dtype=torch.bool)
        n_known = min(len(allowed), len(ruled_out))  # a model may have more rows than tokens
        ruled_out[:n_known] = allowed[:n_known] == 0
        return scores.masked_fill(ruled_out.to(scores.device), -torch.inf)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Any:
    """The tokenizer as llguidance wants it, which takes about a second to make."""
    from llguidance.hf import from_tokenizer

    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if tuple(ends) not in known:
            known[tuple(ends)] = from_tokenizer(tokenizer, eos_token=ends)
        return known[tuple(ends)]
