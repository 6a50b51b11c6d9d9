"""Text of a running generation, as soon as it is certain."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class TextEmitter:
    """Decodes tokens into text and hands it on; stop strings never get out, not even in part.

    Parameters
    ----------
    emit : callable
        Takes each new piece of text.
    stop : sequence of str
        The generation ends before the first of these.
    shown : sequence of str
        Control tokens that are text here, as the marks of calls; the others are left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        emit: Callable[[str], None],
        stop: Sequence[str] = (),
        shown: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._emit = emit
        self._stop = sorted(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._shown = _ids_of(tokenizer, shown)
        self._ids: list[int] = []
        self._sent = 0
        self.first_token_at: float | None = None
        self.stopped = False

    @property
    def ids(self) -> list[int]:
        return self._ids

    @property
    def n_tokens(self) -> int:
        return len(self._ids)

    def put(self, token: int) -> None:
        """Take the next token of the answer."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._ids.append(token)
        text = self._decode()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # an unfinished character
            self._send(text)

    def end(self) -> None:
        """Hand on what was held back."""
        self._send(self._decode(), final=True)

    def _send(self, text: str, final: bool = False) -> None:
        if self.stopped:
            return
        # What was sent holds none, so that one can only begin after it.
        found = [at for at in (text.find(s, self._sent) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain = min(found)
        else:
            certain = len(text) if final else len(text) - self._may_begin_stop(text)
        if certain > self._sent:
            self._emit(text[self._sent : certain])
            self._sent = certain

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(text) - self._sent), 0, -1):
            end = text[-length:]
            place = bisect_left(self._stop, end)  # what begins with it would stand here
            if place < len(self._stop) and self._stop[place].startswith(end):
                return length
        return 0

    def _decode(self) -> str:
        """The whole answer: some tokenizers drop a blank where decoding begins."""
        text, start = "", 0
        for place, token in enumerate(self._ids):
            if token in self._shown:
                text += self._decoded(self._ids[start:place]) + self._shown[token]
                start = place + 1
        return text + self._decoded(self._ids[start:])

    def _decoded(self, ids: list[int]) -> str:
        decoded: Any = self._tokenizer.decode(ids, skip_special_tokens=True)
        return decoded


def _ids_of(tokenizer: PreTrainedTokenizerBase, shown: Sequence[str]) -> dict[int, str]:
    """Those of the texts that are control tokens, by their ids."""
    if not shown:
        return {}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {token: text for token, text in special.items() if text in shown}
