"""A conversation as its chat template writes it, cut into template text and contents.

The template is never taken apart by rules of ours: its messages are filled with placeholders, and
the rendered text is cut at them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from a3_engine.messages import Chunk, Message
from a3_engine.tools import Tool, spelled_out

PLACEHOLDER = "a3placeholder{}end"
IN_TOOL_TURN = 'a3placeholder{}"end'  # which shows whether a template writes it as JSON
# Some templates write today's date, and chunks computed after it would be others every night. With
# this before a template, it is always the same day.
DAY = {"d": "01", "-d": "1", "e": "1", "j": "001", "m": "01", "-m": "1", "b": "Jan", "B": "January"}
DAY |= {"Y": "2025", "y": "25", "a": "Wed", "A": "Wednesday", "H": "12", "I": "12", "p": "PM"}
DAY |= {"M": "00", "S": "00", "F": "2025-01-01"}
ANY_DAY = "".join(
    [
        "{%- macro strftime_now(format) -%}{{- format",
        *(f" | replace('%{directive}', '{value}')" for directive, value in DAY.items()),
        " -}}{%- endmacro %}\n",
    ]
)
PROBE: Tool = {
    "type": "function",
    "function": {
        "name": "a3probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}


class Contents(NamedTuple):
    """What a message says; ``as_json`` is how Llama's templates write what tools answer."""

    place: int
    parts: list[str | Chunk]
    as_json: bool = False


Piece = str | Contents


class ChatTemplate:
    """What one tokenizer's chat template makes of conversations; without one, texts in a row.

    Attributes
    ----------
    trims : bool
        Whether it strips the blanks around messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.trims = self._knows_tools = False
        if tokenizer.chat_template:
            probe = f" {PLACEHOLDER.format(0)} "
            turn = [{"role": "user", "content": probe}]
            self.trims = probe not in self._render(turn)
            self._knows_tools = PROBE["function"]["name"] in self._render(turn, [PROBE])

    def pieces(
        self, messages: list[Message], tools: Sequence[Tool] = ()
    ) -> tuple[list[Message], list[Piece]]:
        """The messages, and their pieces in the order in which they stand.

        Tools are shown as the template shows them. Where it cannot, they are spelled out in the
        messages that are returned.

        Raises
        ------
        ValueError
            The template refuses the conversation.
        """
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return messages, self._pieces(messages)
        if self._knows_tools:
            try:
                return messages, self._pieces(messages, tools)
            except ValueError:
                pass  # some templates know tools and refuse, say, the form of a call's id
        messages = spelled_out(messages, tools)
        return messages, self._pieces(messages)

    def opening(self) -> str:
        """What it writes before the first user's text, always on the same day."""
        if not self._tokenizer.chat_template:
            return ""
        template = ANY_DAY + self._tokenizer.get_chat_template()
        first = self._pieces([Message("user", "x")], template=template)[0]
        return first if isinstance(first, str) else ""

    def _render(
        self,
        conversation: list[dict[str, Any]],
        tools: Sequence[Tool] = (),
        template: str | None = None,
    ) -> str:
        last = conversation[-1]
        continued = last["role"] == "assistant" and bool(last["content"])
        rendered = self._tokenizer.apply_chat_template(
            conversation,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            chat_template=template,
        )
        assert isinstance(rendered, str)
        return rendered

    def _pieces(
        self, messages: list[Message], tools: Sequence[Tool] = (), template: str | None = None
    ) -> list[Piece]:
        """Template text, and contents with the index of their message, in the order they stand."""
        if not self._tokenizer.chat_template:
            plain: list[Piece] = []
            for index, message in enumerate(messages):
                plain += ["\n\n"] * (index > 0) + [Contents(index, message.parts)]
            return plain
        conversation = []
        for index, message in enumerate(messages):
            silent = message.tool_calls and not message.text
            mark = "" if silent else _mark(index, message)
            conversation.append(message.in_template(mark))
        try:
            return self._cut(messages, self._render(conversation, tools, template))
        except (TemplateError, ValueError) as error:
            if tools or any(message.tool_calls for message in messages):
                raise ValueError(f"The chat template refuses these tools: {error}") from error
            strict = _for_strict_templates(conversation)
            with suppress(TemplateError, ValueError):
                if strict != conversation:
                    return self._cut(messages, self._render(strict, template=template))
            raise ValueError(f"The chat template refuses this conversation: {error}") from error

    def _cut(self, messages: list[Message], text: str) -> list[Piece]:
        """Cut a rendered conversation at the marks that stand for its contents."""
        pieces: list[Piece] = []
        for index, message in enumerate(messages):
            mark = _mark(index, message)
            as_json = mark not in text and inside_json(mark) in text
            mark = inside_json(mark) if as_json else mark
            if message.tool_calls and mark not in text:
                continue  # nothing to show, or a template that shows a turn's calls only
            before, found, text = text.partition(mark)
            if not found or mark in text:
                raise ValueError(
                    f"The chat template does not show message {index} ({message.role!r}) exactly "
                    "once and in order; pass such a conversation as one user message."
                )
            pieces += [before] * bool(before)
            parts = _stripped(message.parts) if self.trims else message.parts
            pieces.append(Contents(index, parts, as_json))
        return pieces + [text] * bool(text)


def _mark(index: int, message: Message) -> str:
    return (IN_TOOL_TURN if message.role == "tool" else PLACEHOLDER).format(index)


def inside_json(text: str) -> str:
    """As it stands between the quotes of a JSON string, in the way of transformers' templates."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _for_strict_templates(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same texts in the same order for templates without a system role or with strict turns."""
    merged: list[dict[str, Any]] = []
    for turn in conversation:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + turn["content"]
        else:
            merged.append({"role": role, "content": turn["content"]})
    return merged


def _stripped(parts: list[str | Chunk]) -> list[str | Chunk]:
    """Parts as a template that trims its messages would show them; at least one."""
    rest = list(parts)
    while rest and isinstance(rest[0], str):
        rest[0] = rest[0].lstrip()
        if rest[0]:
            break
        del rest[0]
    while rest and isinstance(rest[-1], str):
        rest[-1] = rest[-1].rstrip()
        if rest[-1]:
            break
        del rest[-1]
    return rest or [""]
