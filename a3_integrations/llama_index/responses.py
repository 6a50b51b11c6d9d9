"""LlamaIndex's messages in the engine's words, and its answers as LlamaIndex's responses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    DocumentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from a3_engine import Chunk, FusionReport, Message
from a3_engine.messages import ToolCall


def to_conversation(messages: Iterable[ChatMessage]) -> list[Message]:
    """The same conversation for the engine.

    Agents give a tool's result the call's id alone, and some templates write the tool's name.
    """
    turns = [to_engine(message) for message in messages]
    names = {call.id: call.name for turn in turns for call in turn.tool_calls if call.id}
    return [
        replace(turn, name=names.get(turn.tool_call_id or "")) if turn.name is None else turn
        for turn in turns
    ]


def to_engine(message: ChatMessage) -> Message:
    """The same message for the engine; `ValueError` where a part of it is no text."""
    parts: list[str | Chunk] = []
    calls = _calls(message.additional_kwargs.get("tool_calls"))
    own_calls = []
    for block in message.blocks:
        if isinstance(block, ToolCallBlock):
            own_calls.append(_call(block.tool_name, block.tool_kwargs, block.tool_call_id))
            continue
        part = _said(block)
        if part != "":
            parts += ["\n"] * bool(parts) + [part]
    name, of = (message.additional_kwargs.get(key) for key in ("name", "tool_call_id"))
    return Message(
        message.role.value,
        parts or "",
        tool_calls=own_calls or calls,
        name=name if isinstance(name, str) else None,
        tool_call_id=of if isinstance(of, str) else None,
    )


def _said(block: Any) -> str | Chunk:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock):
        try:
            data = block.resolve_document().read()
            return Chunk(data.decode(), block.title) if data else ""
        except (ValueError, OSError) as error:
            raise ValueError(
                f"A3LLM reads text; the document {block.title!r} is none. Turn it into text first."
            ) from error
    inner = getattr(block, "content", None) or getattr(block, "cited_content", None)
    if isinstance(inner, list):
        return "\n".join(text for text in map(_said, inner) if isinstance(text, str) and text)
    kind = getattr(block, "block_type", type(block).__name__)
    if any(kind == other for other in ("image", "audio", "video")):
        raise ValueError(f"A3LLM reads text; a {kind!r} block has none. Turn it into text first.")
    return ""  # thinking, marks


def _calls(given: Any) -> list[ToolCall]:
    """Calls as memories keep them: OpenAI's, as objects or as plain values."""
    calls = []
    for item in given if isinstance(given, list | tuple) else ():
        call = _fields(item)
        function = _fields(call.get("function", call))
        if isinstance(name := function.get("name"), str):
            calls.append(_call(name, function.get("arguments"), call.get("id")))
    return calls


def _fields(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else getattr(given, "__dict__", {})


def _call(name: str, arguments: Any, call_id: Any) -> ToolCall:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = {"arguments": arguments}
    return ToolCall(
        name, arguments if isinstance(arguments, Mapping) else {}, str(call_id) if call_id else ""
    )


def _raw(report: FusionReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    usage = {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.generated_tokens,
        "total_tokens": report.prompt_tokens + report.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
    }
    return {"usage": usage, "a3": report.to_dict()}


def chat_response(
    text: str, delta: str | None, report: FusionReport | None, calls: Sequence[ToolCall] = ()
) -> ChatResponse:
    """The answer so far, the piece that came last, and at the end what happened and the calls.

    Calls stand in blocks, where agents look, and in OpenAI's form, where structured streams do.
    """
    blocks = [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
        for call in calls
    ]
    message = ChatMessage(
        role=MessageRole.ASSISTANT,
        content=[TextBlock(text=text), *blocks] if text or not calls else blocks,
        additional_kwargs={"tool_calls": [_openais(call) for call in calls]} if calls else {},
    )
    return ChatResponse(message=message, delta=delta, raw=_raw(report), logprobs=_logprobs(report))


def _openais(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def completion_response(
    text: str, delta: str | None, report: FusionReport | None
) -> CompletionResponse:
    """The same for a completion, which calls nothing."""
    return CompletionResponse(text=text, delta=delta, raw=_raw(report), logprobs=_logprobs(report))


def _logprobs(report: FusionReport | None) -> list[list[LogProb]] | None:
    """For each token the likeliest ones in its place, or it alone where none were asked for."""
    if report is None or report.logprobs is None:
        return None
    return [
        [
            LogProb(token=token, logprob=logprob, bytes=list(token.encode()))
            for token, logprob in entry.top or [(entry.token, entry.logprob)]
        ]
        for entry in report.logprobs
    ]
