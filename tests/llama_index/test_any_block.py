"""Any history of the blocks that LlamaIndex defines."""

from __future__ import annotations

import base64

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import ChatMessage, MessageRole

from a3_integrations.llama_index import A3LLM
from tests.blocks import JSON, TEXTS, dictionaries, is_clear_refusal

BYTES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"said", "Z\u00fcrich".encode(), b"\xff\xfe", b"%PDF-1.4", b"\x89PNG\r\n"]),
)
DATA = BYTES.map(base64.b64encode)
HERE = st.sampled_from([__file__, "pyproject.toml"])  # a block takes only files that are there
TEXT = st.builds(types.TextBlock, text=TEXTS)
CITABLE = st.one_of(
    TEXT,
    st.builds(types.ImageBlock, image=DATA),
    st.builds(types.ImageBlock, path=HERE),
    st.builds(types.DocumentBlock, data=st.one_of(BYTES, DATA), title=TEXTS),
    st.builds(types.DocumentBlock, path=HERE, title=TEXTS),
)
PLAIN = st.one_of(
    CITABLE,
    st.builds(types.AudioBlock, audio=DATA),
    st.builds(types.VideoBlock, video=DATA),
    st.builds(types.CachePoint, cache_control=st.builds(types.CacheControl, type=TEXTS)),
    st.builds(types.ThinkingBlock, content=st.one_of(st.none(), TEXTS)),
    st.builds(
        types.ToolCallBlock,
        tool_name=TEXTS,
        tool_call_id=st.one_of(st.none(), TEXTS),
        tool_kwargs=st.one_of(TEXTS, st.dictionaries(TEXTS, JSON, max_size=2)),
    ),
)
BLOCKS = st.one_of(
    PLAIN,
    st.builds(
        types.CitableBlock,
        title=TEXTS,
        source=TEXTS,
        content=st.lists(CITABLE, max_size=2),
    ),
    st.builds(
        types.CitationBlock,
        cited_content=TEXT,
        source=TEXTS,
        title=TEXTS,
        additional_location_info=st.dictionaries(TEXTS, st.integers(), max_size=1),
    ),
)
CALLS = st.one_of(
    JSON,
    st.lists(dictionaries({}, ["id", "type", "function", "name", "arguments"]), max_size=2),
    st.lists(
        st.fixed_dictionaries(
            {"id": JSON, "function": dictionaries({"name": TEXTS}, ["arguments"])}
        ),
        max_size=2,
    ),
)
KWARGS = st.fixed_dictionaries(
    {}, optional={"tool_calls": CALLS, "name": JSON, "tool_call_id": JSON}
)


def built(role: MessageRole, blocks: list, more: dict) -> ChatMessage | None:
    """None where LlamaIndex itself takes no such message."""
    try:
        return ChatMessage(role=role, blocks=blocks, additional_kwargs=more)
    except ValueError:
        return None


MESSAGES = st.builds(
    built, st.sampled_from(list(MessageRole)), st.lists(BLOCKS, max_size=3), KWARGS
).filter(lambda message: message is not None)


@pytest.fixture(scope="module")
def llm(engine_of_any_template):
    return A3LLM(engine=engine_of_any_template, max_new_tokens=1)


@given(st.lists(MESSAGES, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history_gives_a_prompt_or_a_clear_refusal(llm, history: list[ChatMessage]):
    try:
        assert llm._from_messages(history).n_tokens > 0
    except Exception as error:
        if not is_clear_refusal(error):
            raise
