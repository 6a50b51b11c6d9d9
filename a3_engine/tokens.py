"""Token ids of a prompt's texts, as they stand inside a prompt.

Template text may hold control tokens; what users and documents say is always tokenized as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from a3_engine.messages import clean
from a3_engine.processes import Lock, cached_property

JOINT = "\n"  # stands before what is tokenized as the inside of a prompt, and is cut off again
REMEMBERED_CHUNKS = 256  # their ids, some kilobytes each; the same documents are asked again

_locks: WeakKeyDictionary[PreTrainedTokenizerBase, Lock] = WeakKeyDictionary()
_locks_lock = Lock()


class PromptTokenizer:
    """A tokenizer with what it does at a prompt's beginning and inside it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase

    Attributes
    ----------
    bos : tuple of int
        What the tokenizer itself puts before any text: BOS, or nothing.
    joint : tuple of int
        Ids of `JOINT` where the tokenizer puts a blank before what stands alone, as SentencePiece
        does; else empty.
    openers : frozenset of int
        Control tokens after which it puts that blank again, as it does in a whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._lock = _lock_of(tokenizer)
        self._remembered_ids = lru_cache(REMEMBERED_CHUNKS)(self.tokenize_text)
        self.joint = self._blank_before()
        self.openers = self._blank_after() if self.joint else frozenset()
        self.bos = self._leading_ids()

    @cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for at most."""
        return max(map(len, self.tokenizer.get_vocab()))

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk: its text without white space around it, never control tokens."""
        return self._remembered_ids(text.strip())

    def tokenize_text(self, text: str, begins: bool = False) -> tuple[int, ...]:
        """Ids of text in which control tokens are only characters; it may begin the prompt."""
        return self._tokenize(clean(text), begins, split_special_tokens=True)

    def tokenize_template(self, text: str, begins: bool = True) -> tuple[int, ...]:
        """Ids of template text, in which control tokens count; it may begin the prompt."""
        return self._tokenize(clean(text), begins, split_special_tokens=False)

    def _tokenize(self, text: str, begins: bool, **options: bool) -> tuple[int, ...]:
        """SentencePiece puts a blank before each text, which inside a prompt has none."""
        joint = () if begins else self.joint
        with self._lock:
            encoded = self.tokenizer(
                JOINT * bool(joint) + text, add_special_tokens=False, **options
            )
        ids = tuple(encoded.input_ids)
        if ids[: len(joint)] == joint:
            return ids[len(joint) :]
        return self._tokenize(text, True, **options)  # the joint became one token with the text

    def _blank_before(self) -> tuple[int, ...]:
        """See ``joint``."""
        with self._lock:
            joint, alone, joined = (
                tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
                for text in (JOINT, "a", JOINT + "a")
            )
        adds = joined[: len(joint)] == joint and joined[len(joint) :] != alone
        return joint if adds else ()

    def _blank_after(self) -> frozenset[int]:
        """See ``openers``."""
        added = self.tokenizer.added_tokens_decoder
        if not added:
            return frozenset()
        with self._lock:
            options = {"add_special_tokens": False, "split_special_tokens": False}
            alone = self.tokenizer("a", **options).input_ids
            texts = [f"{token.content}a" for token in added.values()]
            found = self.tokenizer(texts, **options).input_ids
        return frozenset(
            token for token, ids in zip(added, found, strict=True) if ids == [token, *alone]
        )

    def _leading_ids(self) -> tuple[int, ...]:
        """See ``bos``."""
        with self._lock:
            plain = self.tokenizer("a", add_special_tokens=False).input_ids
            full = self.tokenizer("a", add_special_tokens=True).input_ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def begins_after(self, ids: Sequence[int]) -> bool:
        """Whether text after these ids is tokenized as that which begins a prompt."""
        return not ids or ids[-1] in self.openers

    def with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids that begin a prompt, with BOS where the tokenizer puts one."""
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids


def _lock_of(tokenizer: PreTrainedTokenizerBase) -> Lock:
    """Fast tokenizers keep the handling of special tokens as state, which engines may share."""
    with _locks_lock:
        return _locks.setdefault(tokenizer, Lock(around_foreign=True))
