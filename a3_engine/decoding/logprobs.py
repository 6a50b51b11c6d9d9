"""Log probabilities of an answer's tokens, and of the likeliest ones in their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from a3_engine.report import TokenLogprob

ANCHOR = "a"  # stands before a token, since some tokenizers drop a blank where decoding begins


class RecordLogprobs(LogitsProcessor):
    """Looks on while tokens are chosen; one object serves one answer.

    As the first of a request's own processors it sees the model's distribution after a repetition
    penalty, and before temperature, top-k, top-p and a grammar.

    Parameters
    ----------
    n_top : int
        How many of the likeliest tokens are kept in each place.
    """

    def __init__(self, n_top: int) -> None:
        self._n_top = n_top
        self._pending: torch.Tensor | None = None
        self._entries: list[tuple[float, list[int], list[float]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._settle(int(input_ids[0, -1]))
        self._pending = scores[0].float().log_softmax(-1)
        return scores

    def _settle(self, token: int) -> None:
        """The distribution seen last led to this token; before the first there was none."""
        if self._pending is None:
            return
        values, ids = self._pending.topk(self._n_top)
        self._entries.append((float(self._pending[token]), ids.tolist(), values.tolist()))
        self._pending = None

    def result(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
    ) -> tuple[TokenLogprob, ...]:
        """One entry for each of the answer's tokens ``ids``, but for special ones like its end."""
        if ids:
            self._settle(ids[-1])
        anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        special = set(tokenizer.all_special_ids)
        n_anchor = len(str(tokenizer.decode(anchor)))

        def text(token: int) -> str:
            return str(tokenizer.decode([*anchor, token]))[n_anchor:]

        return tuple(
            TokenLogprob(
                text(token),
                logprob,
                tuple((text(t), value) for t, value in zip(top, values, strict=True)),
            )
            for token, (logprob, top, values) in zip(ids, self._entries, strict=True)
            if token not in special
        )
