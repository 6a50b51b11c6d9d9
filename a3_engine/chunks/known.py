"""What a stored chunk says of the text that it was made of, so that every index can be made anew.

Only a hash, the two ends and the length are kept: enough to find the text again inside a prompt.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

ANCHOR = 32  # shorter texts are not matched: they would be found where nobody meant them


class Known(NamedTuple):
    """How a text is found again: its hash, its length, how it begins, how it ends."""

    sha256: str
    chars: int
    head: str
    tail: str

    @classmethod
    def of(cls, text: str) -> Known | None:
        """None for a text that is too short to be looked for."""
        if len(text) < ANCHOR:
            return None
        return cls(text_hash(text), len(text), text[:ANCHOR], text[-ANCHOR:])

    @classmethod
    def read(cls, fields: Any) -> Known | None:
        """What somebody else wrote, where it can be such a row."""
        kinds = (str, int, str, str)
        if not isinstance(fields, list | tuple) or len(fields) != len(kinds):
            return None
        if not all(type(value) is kind for value, kind in zip(fields, kinds, strict=True)):
            return None
        known = cls(*fields)
        fits = len(known.head) == len(known.tail) == ANCHOR <= known.chars < 2**40
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


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
