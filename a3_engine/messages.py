"""What a conversation is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """A piece of a document whose KV is kept. ``tag`` groups chunks for eviction."""

    text: str
    tag: str | None = None


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
