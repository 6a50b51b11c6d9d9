"""What a stored chunk says of the text that it was made of, so that every index can be made anew.

Only a hash, the beginning, the length and a rolling sum are kept: enough to find the text again
inside a prompt.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BASE = 0x9E3779B97F4A7C15  # odd, so that it can be divided by
INVERSE = pow(BASE, -1, 2**64)
ANCHOR = 32  # shorter texts are not matched: they would be found where nobody meant them


class Known(NamedTuple):
    """How a text is found again: its hash, its length, how it begins, and its rolling sum."""

    sha256: str
    chars: int
    head: str
    rolling: int

    @classmethod
    def of(cls, text: str) -> Known | None:
        """None for a text that is too short to be looked for."""
        if len(text) < ANCHOR:
            return None
        return cls(text_hash(text), len(text), text[:ANCHOR], Rolling(text).of(0, len(text)))

    @classmethod
    def read(cls, fields: Any) -> Known | None:
        """What somebody else wrote, where it can be such a row."""
        kinds = (str, int, str, int)
        if not isinstance(fields, list | tuple) or len(fields) != len(kinds):
            return None
        if not all(type(value) is kind for value, kind in zip(fields, kinds, strict=True)):
            return None
        known = cls(*fields)
        fits = len(known.head) == ANCHOR <= known.chars < 2**40 and abs(known.rolling) < 2**63
        return known if fits and len(known.sha256) == 64 else None


class About(NamedTuple):
    """Whose KV a payload is: its text, and the tag that it was stored with."""

    known: Known | None = None
    tag: str | None = None

    def to_json(self) -> str:
        return "" if self == About() else json.dumps({"text": self.known, "tag": self.tag})

    @classmethod
    def from_json(cls, text: str) -> About:
        """Nothing for anything that `to_json` cannot have written."""
        try:
            fields = json.loads(text) if text else {}
            tag = fields.get("tag")
            return cls(Known.read(fields.get("text")), tag if isinstance(tag, str) else None)
        except (ValueError, AttributeError, RecursionError):
            return cls()


class Rolling:
    """Sums of a text's parts, each in no time: equal for equal parts, wherever they stand.

    The sum of ``letter * BASE ** place``, brought back to place 0. It only chooses what is worth a
    hash, so that somebody who makes two texts with one sum costs time, and no more.
    """

    def __init__(self, text: str) -> None:
        letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        self._back = _powers(INVERSE, len(letters) + 1)
        terms = (letters.astype(np.uint64) + np.uint64(1)) * _powers(BASE, len(letters))
        self._sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)])

    def of(self, start: int, stop: int) -> int:
        """The sum of ``text[start:stop]``, a signed 64-bit number."""
        return int(self.of_all(start, np.array([stop]))[0])

    def of_all(self, start: int, stops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """:meth:`of` for one beginning and several ends."""
        return ((self._sums[stops] - self._sums[start]) * self._back[start]).view(np.int64)


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """1, base, its square and so on, in 64 bits."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return factors.cumprod(dtype=np.uint64)


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
