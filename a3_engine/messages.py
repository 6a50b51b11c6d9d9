"""What a conversation is made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Text that has bytes: halves of characters, as PDF readers leave them, are replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        _warn_of_halves()
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _warn_of_halves() -> None:
    logger.warning(
        "A text holds lone surrogates, halves of characters that no tokenizer takes; each is "
        "replaced by U+FFFD, here and in all later texts."
    )


@dataclass(frozen=True)
class Chunk:
    """A piece of a document whose KV is kept. ``tag`` groups chunks for eviction."""

    text: str
    tag: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.tag, str | None):
            raise TypeError(
                "A chunk has a text and a tag of str, or no tag: not "
                f"{type(self.text).__name__} and {type(self.tag).__name__}."
            )
        object.__setattr__(self, "text", clean(self.text))
        if self.tag is not None:
            object.__setattr__(self, "tag", clean(self.tag))

    @classmethod
    def read(cls, given: object) -> Chunk:
        """A chunk as callers give it: a text, or a `Chunk`."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        raise TypeError(f"A chunk is a text or Chunk(text, tag), not {type(given).__name__}.")


@dataclass(frozen=True)
class ToolCall:
    """A model's wish to have a function called."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. ``content`` is text, or text and chunks in the order in which they stand.

    An assistant's turn may hold ``tool_calls``; a turn of role ``"tool"`` answers the one with its
    ``tool_call_id``, and ``name`` is the tool's.
    """

    role: str
    content: str | Sequence[str | Chunk]
    tool_calls: Sequence[ToolCall] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        content = self.content
        if isinstance(content, str):
            content = clean(content)
        elif isinstance(content, Sequence) and all(isinstance(p, str | Chunk) for p in content):
            content = [clean(part) if isinstance(part, str) else part for part in content]
        else:
            raise TypeError(
                "A message's content is a text, or a list of texts and chunks, not "
                f"{type(content).__name__}."
            )
        if not isinstance(self.role, str):
            raise TypeError(f"A message's role is a text, not {type(self.role).__name__}.")
        object.__setattr__(self, "content", content)

    @classmethod
    def read(cls, given: object) -> Message:
        """A message as callers give it: a `Message`, or a dict with role and content."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping) and {"role", "content"} <= set(given):
            content = given["content"]
            return cls(given["role"], "" if content is None else content)
        raise TypeError(
            'A conversation is a list of Message, or of {"role": ..., "content": ...}, not of '
            f"{type(given).__name__}."
        )

    @property
    def parts(self) -> list[str | Chunk]:
        return [self.content] if isinstance(self.content, str) else list(self.content) or [""]

    @property
    def text(self) -> str:
        return "".join(part.text if isinstance(part, Chunk) else part for part in self.parts)

    def in_template(self, content: str) -> dict[str, Any]:
        """The turn as chat templates take it, with other content."""
        turn: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in self.tool_calls
            ]
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {key: value for key, value in named.items() if value is not None}
