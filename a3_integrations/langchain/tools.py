"""LangChain's tools in the engine's words, and the engine's calls in LangChain's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from a3_engine.messages import ToolCall
from a3_engine.schemas import holds_itself, without_references
from a3_engine.tools import CallReader, Malformed, Tool, in_full, new_call_id


def to_schema(tool: dict[str, Any] | type | Callable[..., Any] | BaseTool) -> Tool:
    """A tool as a function schema without references."""
    schema = convert_to_openai_tool(tool)
    model = getattr(tool, "tool_call_schema", tool)
    if isinstance(model, type) and issubclass(model, BaseModel):
        whole = model.model_json_schema()
        if holds_itself(whole):
            # LangChain leaves an empty schema where something holds itself.
            parameters = {k: v for k, v in whole.items() if k not in ("title", "description")}
            schema = schema | {"function": schema["function"] | {"parameters": parameters}}
    return in_full(schema)


def to_form(response_format: object) -> Any:
    """OpenAI's ``response_format``, which agents bind, as `grammar` wants it.

    Raises
    ------
    ValueError
        It is of a type that is not there.
    """
    match response_format:
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return without_references(schema)
        case {"type": "json_object"}:
            return "json"
        case {"type": "text"}:
            return None
        case {"type": "json_schema"}:
            raise ValueError(
                'A response_format of type json_schema has {"json_schema": {"schema": {...}}}.'
            )
        case {"type": str(kind)}:
            raise ValueError(
                f"There is no response_format of type {kind!r}: use json_schema, json_object or "
                "text."
            )
    raise TypeError(
        "A response_format is a dict with a type of json_schema, json_object or text, not "
        f"{response_format!r:.40}."
    )


def to_json_schema(schema: Any) -> dict[str, Any]:
    """A schema, given in any of LangChain's ways, as JSON schema without references."""
    return without_references(convert_to_json_schema(schema))


def closing_chunk(reader: CallReader | None, **fields: Any) -> AIMessageChunk:
    """The last chunk of an answer, with the text that was held back and the tool calls."""
    rest, calls, malformed = reader.end() if reader else ("", [], [])
    chunks = [*map(_call_chunk, calls), *map(_malformed_chunk, malformed)]
    for index, chunk in enumerate(chunks):
        chunk["index"] = index
    return AIMessageChunk(content=rest, tool_call_chunks=chunks, chunk_position="last", **fields)


def _call_chunk(call: ToolCall) -> ToolCallChunk:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return tool_call_chunk(name=call.name, args=arguments, id=new_call_id())


def _malformed_chunk(malformed: Malformed) -> ToolCallChunk:
    """LangChain makes it an `invalid_tool_call`, since a JSON string is no object of arguments."""
    return tool_call_chunk(name=None, args=json.dumps(malformed.text), id=new_call_id())
