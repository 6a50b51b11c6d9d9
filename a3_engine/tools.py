"""Tools, for chat templates that know of them and for those that do not, and calls in answers.

Tools are given as OpenAI's function schemas, which is what chat templates take. Where a template
has no place for them they are spelled out in the notation of the Hermes models (NousResearch
Hermes-Function-Calling), which Qwen and SmolLM were trained on too: schemas in the system message,
calls between ``<tool_call>`` tags, results between ``<tool_response>`` tags.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a3_engine.messages import Chunk, Message, ToolCall
from a3_engine.schemas import without_references

Tool = dict[str, Any]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# What calls stand after in the answers of other models: Mistral's, Granite's, Llama's.
BEHIND = ("[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>")
ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
# Control tokens in some vocabularies; an answer's text is read with them where there are tools.
MARKS = (OPEN, CLOSE, *BEHIND, ARGUMENTS, CALL_ID)
ID_CHARACTERS = string.ascii_letters + string.digits
INSTRUCTIONS = """\
You can call functions. These are their JSON schemas:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON, between tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


def spelled_out(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation in turns of plain text; results keep their role."""
    plain: list[Message] = []
    responses = False
    for message in messages:
        if message.role == "tool":
            response: list[str | Chunk] = [
                "<tool_response>\n",
                *message.parts,
                "\n</tool_response>",
            ]
            if responses:
                response = [*plain.pop().parts, "\n", *response]
            plain.append(Message("tool", _joined(response)))
        elif message.tool_calls:
            calls = "\n".join(map(_spelled, message.tool_calls))
            between = ["\n"] if message.text else []
            plain.append(Message(message.role, _joined([*message.parts, *between, calls])))
        else:
            plain.append(message)
        responses = message.role == "tool"
    if tools:
        shown = [json.dumps(tool, ensure_ascii=False) for tool in tools]
        text = INSTRUCTIONS.format(tools="\n".join(shown))
        if plain and plain[0].role == "system":
            plain[0] = replace(plain[0], content=_joined([*plain[0].parts, "\n\n", text]))
        else:
            plain.insert(0, Message("system", text))
    return plain


def call_grammar(tools: Sequence[Tool]) -> str:
    """A grammar of exactly one call of one of the tools, with arguments that fit its schema."""
    return f"start: call\n{_call_rules(tools)}"


def json_grammar(schema: dict[str, Any], tools: Sequence[Tool] = ()) -> str:
    """A grammar of JSON that fits a schema, or of one call where there are tools."""
    answer = f"answer: %json {_compiled(schema)}"
    if not tools:
        return f"start: answer\n{answer}"
    return f"start: answer | call\n{answer}\n{_call_rules(tools)}"


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
    match choice:
        case None | False | "auto" | "none":
            return None
        case True | "any" | "required":
            return list(tools)
        case {"function": {"name": str(name)}} | {"name": str(name)} | str(name):
            found = [tool for tool in tools if tool["function"]["name"] == name]
        case _:
            found = []
    if not found:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise ValueError(f"tool_choice {choice!r:.80} names no tool; there are: {names}.")
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


def listed(tools: object) -> list[Any]:
    """What was given for tools; None is none."""
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise TypeError(f"tools is a list of tools, not {type(tools).__name__}.")
    return list(tools)


def in_full(tool: Tool) -> Tool:
    """A tool whose parameters refer to nothing: templates show them as they stand."""
    match tool:
        case {"function": {"name": str(), "parameters": dict(parameters)} as function}:
            pass
        case {"function": {"name": str()} as function} if "parameters" not in function:
            parameters = {}
        case _:
            raise ValueError(
                'A tool is {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": {{...}}}}}}, not {tool!r:.80}.'
            )
    return tool | {"function": function | {"parameters": without_references(parameters)}}


def new_call_id() -> str:
    """Nine letters or digits, which is what the strictest chat template (Mistral's) takes."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


@dataclass(frozen=True)
class Malformed:
    """What stood where a call belongs, and why it is none."""

    text: str
    error: str


class CallReader:
    """Tells text from calls while an answer is streamed.

    It knows calls between tags (Hermes, Qwen, SmolLM), after a mark (Mistral, Granite, Llama), and
    an answer that is nothing but calls in JSON. What may become a call is held back until it is
    certain.

    Parameters
    ----------
    names : iterable of str
        The tools' names. JSON without tags that names none of them is text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._text = ""
        self._shown = 0

    def put(self, piece: str) -> str:
        """Take a piece of the answer; returns the text that is certain now."""
        self._text += piece
        if self._text.lstrip()[:1] in ("", "{", "["):
            return ""
        found = [at for at in (self._text.find(mark) for mark in (OPEN, *BEHIND)) if at >= 0]
        overlap = max(_overlap(self._text, mark) for mark in (OPEN, *BEHIND))
        return self._show(min(found) if found else len(self._text) - overlap)

    def end(self) -> tuple[str, list[ToolCall], list[Malformed]]:
        """What is left of the text, the calls, and what only looks like calls."""
        start = self._text.find(OPEN)
        if start >= 0:
            calls, bad = _tagged(self._text[start:])
            return self._show(start), calls, bad
        starts = [at for at in (self._text.find(mark) for mark in BEHIND) if at >= 0]
        if starts:
            calls, bad = _behind_marks(self._text[min(starts) :])
            return self._show(min(starts)), calls, bad
        bare = _bare(self._text)
        if bare and all(call.name in self._names for call in bare):
            return "", bare, []
        return self._show(len(self._text)), [], []

    def _show(self, until: int) -> str:
        text = self._text[self._shown : until]
        self._shown = max(self._shown, until)
        return text


def _spelled(call: ToolCall) -> str:
    body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return f"{OPEN}\n{body}\n{CLOSE}"


def _joined(parts: Iterable[str | Chunk]) -> list[str | Chunk]:
    """Neighbouring texts as one: they are tokenized as they would be in one string."""
    joined: list[str | Chunk] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _call_rules(tools: Sequence[Tool]) -> str:
    definitions: dict[str, Any] = {}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _arguments(tool, definitions),
            },
            "required": ["name", "arguments"],
        }
        for tool in tools
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if definitions:
        schema = {**schema, "$defs": definitions}
    return f'call: "{OPEN}\\n" body "\\n{CLOSE}"\nbody: %json {_compiled(schema)}'


def _compiled(schema: dict[str, Any]) -> str:
    """A schema for the grammar: no properties but those named, and no loose white space.

    What the grammar has no rule for is left free; who asked for the schema checks the answer by it.
    """
    options = {"whitespace_flexible": False, "lenient": True}
    return json.dumps({"x-guidance": options} | _closed(schema))


def _arguments(tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _without_definitions(tool["function"].get("parameters", {}), definitions)
    return schema if "$ref" in schema else {"type": "object", "properties": {}} | schema


def _without_definitions(schema: dict[str, Any], moved: dict[str, Any]) -> dict[str, Any]:
    """A schema that is a part of a larger one, at whose root its definitions have to stand."""
    own = schema.get("$defs")
    if not own:
        return schema
    names = {f"#/$defs/{name}": f"{len(moved)}_{place}" for place, name in enumerate(own)}

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if not isinstance(value, dict):
            return value
        if (target := value.get("$ref")) in names:
            return {"$ref": f"#/$defs/{names[target]}"}
        return {key: renamed(item) for key, item in value.items()}

    rest = renamed({key: value for key, value in schema.items() if key != "$defs"})
    moved |= {names[f"#/$defs/{name}"]: renamed(value) for name, value in own.items()}
    return rest


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that the mark could begin with."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def _tagged(text: str) -> tuple[list[ToolCall], list[Malformed]]:
    calls: list[ToolCall] = []
    bad: list[Malformed] = []
    for body in re.findall(f"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|$)", text, flags=re.DOTALL):
        try:
            calls += _calls(json.loads(body))
        except ValueError as error:
            bad.append(Malformed(body.strip(), f"Not a tool call: {error}"))
    return calls, bad


def _behind_marks(text: str) -> tuple[list[ToolCall], list[Malformed]]:
    """Calls after marks: JSON, or Mistral's ``name[ARGS]{...}``."""
    calls: list[ToolCall] = []
    bad: list[Malformed] = []
    for body in re.split("|".join(map(re.escape, BEHIND)), text):
        body = body.strip()
        if not body:
            continue
        name, found, arguments = body.partition(ARGUMENTS)
        try:
            if found:
                value = {"name": name.partition(CALL_ID)[0].strip(), "arguments": arguments}
                calls += _calls(value)
            else:
                calls += _calls(json.JSONDecoder().raw_decode(body)[0])
        except ValueError as error:
            bad.append(Malformed(body, f"Not a tool call: {error}"))
    return calls, bad


def _bare(text: str) -> list[ToolCall]:
    try:
        return _calls(json.loads(text))
    except ValueError:
        return []


def _calls(value: Any) -> list[ToolCall]:
    """Calls from parsed JSON: an object or a list of them; Llama says parameters for arguments."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ValueError("it names no function")
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("its arguments are no JSON object")
        calls.append(ToolCall(item["name"], arguments))
    return calls
