"""LangChain's tools in the engine's words, and the engine's calls in LangChain's."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json_schema import dereference_refs
from pydantic import BaseModel

from a3_engine.messages import ToolCall
from a3_engine.tools import CallReader, Malformed, Tool, call_grammar, json_grammar

ID_CHARACTERS = string.ascii_letters + string.digits


def to_schema(tool: dict[str, Any] | type | Callable[..., Any] | BaseTool) -> Tool:
    """A tool as a function schema without references."""
    schema = convert_to_openai_tool(tool)
    model = getattr(tool, "tool_call_schema", tool)
    if isinstance(model, type) and issubclass(model, BaseModel):
        whole = model.model_json_schema()
        if any(_leads_back(whole.get("$defs", {}), name) for name in whole.get("$defs", {})):
            # LangChain leaves an empty schema where something holds itself.
            parameters = {k: v for k, v in whole.items() if k not in ("title", "description")}
            schema = schema | {"function": schema["function"] | {"parameters": parameters}}
    return _without_references(schema)


def chosen(tools: Sequence[Tool], choice: Any) -> list[Tool] | None:
    """The tools of which one has to be called; None where the model decides.

    Parameters
    ----------
    choice
        None or ``"auto"``; ``"any"``, ``"required"`` or True; a tool's name; or OpenAI's
        ``{"type": "function", "function": {"name": ...}}``.

    Raises
    ------
    ValueError
        There is no such tool.
    """
    if choice in (None, False, "auto", "none"):
        return None
    if choice in (True, "any", "required"):
        return list(tools)
    name = choice
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name")
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise ValueError(f"tool_choice {choice!r} names no bound tool; there are: {names}.")
    return found


def grammar(tools: Sequence[Tool], choice: Any, form: Any) -> str | None:
    """What the answer has to follow; None for free text.

    Parameters
    ----------
    form
        None, ``"json"`` for any JSON object, or a JSON schema. Where there are tools of which none
        has to be called, the model may call one in place of answering.
    """
    forced = chosen(tools, choice)
    if forced and form is not None:
        raise ValueError("An answer cannot be a forced tool call and JSON of a format at once.")
    if forced:
        return call_grammar(forced)
    if form is None:
        return None
    return json_grammar({"type": "object"} if form == "json" else form, tools)


def to_form(response_format: dict[str, Any]) -> Any:
    """OpenAI's ``response_format``, which agents bind, as `grammar` wants it.

    Raises
    ------
    ValueError
        It is of a type that is not there.
    """
    kind = response_format.get("type")
    if kind == "json_schema":
        return _without_references(response_format["json_schema"]["schema"])
    if kind not in ("json_object", "text"):
        raise ValueError(
            f"There is no response_format of type {kind!r}: use json_schema, json_object or text."
        )
    return "json" if kind == "json_object" else None


def to_json_schema(schema: Any) -> dict[str, Any]:
    """A schema, given in any of LangChain's ways, as JSON schema without references."""
    return _without_references(convert_to_json_schema(schema))


def closing_chunk(reader: CallReader | None, **fields: Any) -> AIMessageChunk:
    """The last chunk of an answer, with the text that was held back and the tool calls."""
    rest, calls, malformed = reader.end() if reader else ("", [], [])
    chunks = [*map(_call_chunk, calls), *map(_malformed_chunk, malformed)]
    for index, chunk in enumerate(chunks):
        chunk["index"] = index
    return AIMessageChunk(content=rest, tool_call_chunks=chunks, chunk_position="last", **fields)


def _call_chunk(call: ToolCall) -> ToolCallChunk:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return tool_call_chunk(name=call.name, args=arguments, id=_new_id())


def _malformed_chunk(malformed: Malformed) -> ToolCallChunk:
    """LangChain makes it an `invalid_tool_call`, since a JSON string is no object of arguments."""
    return tool_call_chunk(name=None, args=json.dumps(malformed.text), id=_new_id())


def _new_id() -> str:
    """Nine letters or digits, which is what the strictest chat template (Mistral's) takes."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


def _without_references(schema: dict[str, Any]) -> dict[str, Any]:
    """References replaced by what they point at: a grammar and a template read no others."""
    if "function" in schema:
        function = schema["function"]
        parameters = _without_references(function.get("parameters", {}))
        return schema | {"function": function | {"parameters": parameters}}
    if "definitions" in schema and "$defs" not in schema:
        text = json.dumps(schema).replace("#/definitions/", "#/$defs/")
        schema = json.loads(text)
        schema["$defs"] = schema.pop("definitions")
    if any(_leads_back(schema.get("$defs", {}), name) for name in schema.get("$defs", {})):
        return schema  # of what holds itself no copy without references can be made
    inlined = dereference_refs(schema)
    return {key: value for key, value in inlined.items() if key != "$defs"}


def _leads_back(definitions: dict[str, Any], name: str) -> bool:
    """Whether a definition refers to itself, through others too."""
    seen: set[str] = set()
    ahead = [definitions[name]]
    while ahead:
        value = ahead.pop()
        if isinstance(value, list):
            ahead += value
        elif isinstance(value, dict):
            target = str(value.get("$ref", "")).removeprefix("#/$defs/")
            if target == name:
                return True
            if target in definitions and target not in seen:
                seen.add(target)
                ahead.append(definitions[target])
            ahead += value.values()
    return False
