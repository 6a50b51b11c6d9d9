"""LangChain's messages in the engine's words.

Neighbouring turns of one role become one turn, a person's name stands before what they say, and
documents become chunks: from ``text-plain`` blocks, and from the artifact of a retriever tool's
`ToolMessage` where their texts stand in its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from a3_engine import Message
from a3_engine.messages import ToolCall
from a3_integrations.langchain.documents import Part, cut, from_blocks, joined

ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "developer": "system"}


def to_engine(messages: Iterable[BaseMessage]) -> list[Message]:
    """The same conversation for the engine.

    Raises
    ------
    ValueError
        A message holds something else than text.
    TypeError
        A message is of a kind that has no place in a conversation.
    """
    turns: list[Message] = []
    for message in messages:
        turn = Message(
            _role(message),
            _parts(message),
            tool_calls=_calls(message),
            name=message.name if isinstance(message, (ToolMessage, FunctionMessage)) else None,
            tool_call_id=message.tool_call_id if isinstance(message, ToolMessage) else None,
        )
        if turns and _same_turn(turns[-1], turn):
            turn = Message(turn.role, joined([*turns.pop().parts, "\n\n", *turn.parts]))
        turns.append(turn)
    return turns


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return ROLES.get(message.role, message.role)
    kinds = {
        HumanMessage: "user",
        AIMessage: "assistant",
        SystemMessage: "system",
        ToolMessage: "tool",
        FunctionMessage: "tool",
    }
    for kind, role in kinds.items():
        if isinstance(message, kind):
            return role
    raise TypeError(f"A {type(message).__name__} has no place in a conversation with this model.")


def _parts(message: BaseMessage) -> Sequence[Part]:
    content = message.content
    text = isinstance(content, str)
    parts = cut(content, _documents(message)) if text else from_blocks(content)
    if isinstance(message, HumanMessage) and message.name:
        parts = joined([f"{message.name}: ", *parts])
    return parts


def _documents(message: BaseMessage) -> list[Document]:
    """What a retriever tool found, if the message is its result."""
    artifact = getattr(message, "artifact", None)
    if not isinstance(artifact, list):
        return []
    found = [_document(item) for item in artifact]
    return [document for document in found if document is not None]


def _document(item: object) -> Document | None:
    """A document, also one that came back from a checkpoint as plain values."""
    if isinstance(item, Document):
        return item
    if not isinstance(item, Mapping) or not isinstance(item.get("page_content"), str):
        return None
    metadata, name = item.get("metadata"), item.get("id")
    return Document(
        page_content=item["page_content"],
        metadata=dict(metadata) if isinstance(metadata, Mapping) else {},
        id=name if isinstance(name, str) else None,
    )


def _calls(message: BaseMessage) -> Sequence[ToolCall]:
    if not isinstance(message, AIMessage):
        return ()
    return [ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls]


def _same_turn(before: Message, turn: Message) -> bool:
    return before.role == turn.role != "tool" and not before.tool_calls and not turn.tool_calls
