"""What LangChain's messages, blocks and tool results become."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from a3_engine import Chunk, Message
from a3_integrations.langchain.documents import cut, from_blocks, to_blocks
from a3_integrations.langchain.messages import to_engine
from tests.texts import LAMP, SHORE


def plain(text: str, **more) -> dict:
    return {"type": "text-plain", "mime_type": "text/plain", "text": text, **more}


def said(messages) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in to_engine(messages)]


def test_neighbouring_turns_of_one_role_become_one():
    conversation = [
        SystemMessage("a"),
        SystemMessage("b"),
        HumanMessage("c"),
        HumanMessage("d"),
        AIMessage("e"),
        AIMessage("f"),
        SystemMessage("g"),
        HumanMessage("h"),
    ]
    assert said(conversation) == [
        ("system", "a\n\nb"),
        ("user", "c\n\nd"),
        ("assistant", "e\n\nf"),
        ("system", "g"),
        ("user", "h"),
    ]


def test_roles_and_names():
    conversation = [
        HumanMessage("hello", name="Ada"),
        ChatMessage("hi", role="ai"),
        ChatMessage("why", role="human"),
        FunctionMessage("42", name="f"),
    ]
    assert said(conversation) == [
        ("user", "Ada: hello"),
        ("assistant", "hi"),
        ("user", "why"),
        ("tool", "42"),
    ]
    with pytest.raises(TypeError, match="RemoveMessage"):
        to_engine([RemoveMessage("x")])


def test_documents_in_blocks_stand_by_themselves():
    blocks = [
        {"type": "text", "text": "Read:"},
        plain(LAMP, id="1"),
        plain(f"\n{SHORE} "),
        {"type": "text", "text": "Why?"},
    ]
    parts = from_blocks(blocks)
    assert parts == ["Read:\n\n", Chunk(LAMP, "1"), "\n\n", Chunk(SHORE), "\n\nWhy?"]


@pytest.mark.parametrize(
    "parts",
    [
        ["a", Chunk(LAMP, "1"), "b"],
        [Chunk(LAMP), Chunk(SHORE, "2")],
        ["<doc>", Chunk(SHORE), "</doc><doc>", Chunk(LAMP), "</doc>"],
    ],
)
def test_blocks_made_of_parts_mean_exactly_these(parts):
    assert from_blocks(to_blocks(parts)) == parts


def test_what_is_no_text_is_refused_and_calls_in_blocks_are_not_repeated():
    with pytest.raises(ValueError, match="image"):
        to_engine([HumanMessage([{"type": "image", "base64": "", "mime_type": "image/png"}])])
    with pytest.raises(ValueError, match="text-plain"):
        to_engine([HumanMessage([{"type": "text-plain", "url": "http://x", "text_": ""}])])
    call = {"name": "f", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}
    (turn,) = to_engine([AIMessage([{"type": "text", "text": "Well"}, use], tool_calls=[call])])
    assert (turn.text, len(turn.tool_calls)) == ("Well", 1)


def test_a_retriever_tools_artifact_marks_its_documents():
    documents = [Document(page_content=LAMP, id="1"), Document(page_content=SHORE)]
    content = f"[1] {LAMP}\n\n[2] {SHORE}"
    result = ToolMessage(content, tool_call_id="x", name="search", artifact=documents)
    expected = ["[1] ", Chunk(LAMP, "1"), "\n\n[2] ", Chunk(SHORE)]
    assert to_engine([result]) == [
        Message("tool", expected, tool_calls=(), name="search", tool_call_id="x")
    ]
    other = ToolMessage(content, tool_call_id="x", artifact={"raw": 1})
    assert to_engine([other])[0].parts == [content]


def test_only_documents_that_stand_in_the_text_are_cut_out():
    documents = [Document(page_content=text) for text in (SHORE, "Not there.", LAMP, SHORE, "")]
    text = f"{SHORE} and {LAMP}"
    assert cut(text, documents) == [Chunk(SHORE), " and ", Chunk(LAMP)]
    assert cut(text, documents[2:]) == [f"{SHORE} and ", Chunk(LAMP)]
