"""Histories that other models wrote, and options as other LLMs take them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms.types import (
    AudioBlock,
    CachePoint,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from a3_engine import A3Engine
from a3_integrations.llama_index import A3LLM
from a3_integrations.llama_index.responses import to_engine
from tests.tiny import LONG, STAND_IN, tiny_model, tiny_tokenizer

ROLES = [MessageRole.USER, MessageRole.ASSISTANT, MessageRole.SYSTEM, MessageRole.TOOL]
CALL = {"id": "call_1", "function": {"name": "keeper", "arguments": '{"of": "lamp"}'}}
READ = [
    TextBlock(text="said"),
    TextBlock(text=""),
    ThinkingBlock(content="thought"),
    CachePoint(cache_control={"type": "ephemeral"}),
    DocumentBlock(data=b"said, and more.", title="a.txt", document_mimetype="text/plain"),
    ToolCallBlock(tool_name="keeper", tool_kwargs={"of": "lamp"}, tool_call_id="call_1"),
]
REFUSED = [
    ImageBlock(image=b"\x89PNG\xff"),
    AudioBlock(audio=b"RIFF\xff"),
    DocumentBlock(data=b"%PDF\xff\xfe", title="a.pdf", document_mimetype="application/pdf"),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    engine = A3Engine.from_pretrained(
        tiny_model(LONG), tiny_tokenizer(), cache_dir=folder, stand_in=STAND_IN
    )
    yield A3LLM(engine=engine, max_new_tokens=2)
    engine.close()


def test_text_is_kept_calls_are_calls_and_thoughts_are_left_out():
    turn = to_engine(ChatMessage(role="assistant", blocks=READ))
    assert turn.text == "said\nsaid, and more."
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [("keeper", {"of": "lamp"})]


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.block_type)
def test_what_is_seen_or_heard_is_refused(llm, block):
    with pytest.raises(ValueError, match="reads text"):
        llm.chat([ChatMessage(role="user", blocks=[block])])


def test_calls_that_memories_keep_are_shown(llm):
    """Under additional_kwargs, as plain values."""
    history = [
        ChatMessage(role="user", content="Who?"),
        ChatMessage(role="assistant", content=None, additional_kwargs={"tool_calls": [CALL]}),
        ChatMessage(
            role="tool", content="The keeper.", additional_kwargs={"tool_call_id": "call_1"}
        ),
        ChatMessage(role="user", content="And now?"),
    ]
    prompt = llm._from_messages(history)
    shown = llm.engine.runtime.tokenizer.decode(prompt.ids)
    assert '"name": "keeper"' in shown
    assert '"lamp"' in shown
    assert llm.chat(history).message.content is not None


@given(
    st.lists(
        st.builds(
            lambda role, blocks: ChatMessage(role=role, blocks=blocks),
            st.sampled_from(ROLES),
            st.lists(st.sampled_from([*READ, *REFUSED]), max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_history_gives_a_prompt_or_a_clear_refusal(llm, history):
    try:
        assert llm._from_messages(history).n_tokens > 0
    except ValueError as error:
        assert "reads text" in str(error) or "chat template" in str(error)  # noqa: PT017


def test_options_are_read_as_by_other_llms(llm):
    given = A3LLM(engine=llm.engine, max_new_tokens=2, temperature=None, stop="zzz", top_p=None)
    assert given.stop == ["zzz"]
    expected = given.complete("Who?").text
    assert given.complete("Who?", temperature=None, max_tokens=None, stop=None).text == expected
    assert given.complete("Who?", temperature=1, top_p=1).text is not None


def test_token_counters_count(llm):
    """As those of stock synthesizers do: set for all, by Settings."""
    from llama_index.core import Settings
    from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
    from llama_index.core.schema import NodeWithScore, TextNode

    from a3_integrations.llama_index import A3Synthesizer

    before = Settings._callback_manager
    counter = TokenCountingHandler(tokenizer=llm.engine.runtime.planner.tokenize_text)
    try:
        Settings.callback_manager = CallbackManager([counter])
        own = A3LLM(engine=llm.engine, max_new_tokens=2)
        node = TextNode(text="The lamp of the lighthouse burns through the night.")
        A3Synthesizer(own).synthesize("Who?", [NodeWithScore(node=node, score=1.0)])
    finally:
        Settings._callback_manager = before
    assert counter.total_llm_token_count > 20


def test_parts_are_cut_so_that_the_next_prompt_fits(tiny_engine):
    """It holds the answer so far, which is as long as answers may be."""
    from transformers import LlamaConfig

    from a3_integrations.llama_index import A3Synthesizer
    from tests.tiny import SHAPE

    engine = tiny_engine(LlamaConfig(**{**SHAPE, "max_position_embeddings": 4096}))
    llm = A3LLM(engine=engine, max_new_tokens=900)
    synthesizer = A3Synthesizer(llm)
    texts = [f"{number}. " + "The lamp of the lighthouse burns. " * 30 for number in range(12)]
    parts = synthesizer._make_compact_text_chunks("Who?", texts)
    assert len(parts) > 1
    assert sum(part.count("lighthouse") for part in parts) == 12 * 30
    count = engine.runtime.planner.tokenize_text
    so_far = next(text for n in range(400) if len(count(text := "The keeper. " * n)) >= 890)
    for part in parts:
        messages = synthesizer._refine_template.format_messages(
            llm=llm, query_str="Who?", existing_answer=so_far, context_msg=part
        )
        assert llm._from_messages(messages).n_tokens + 900 <= 4096
