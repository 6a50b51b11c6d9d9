"""Nothing of ours but the LLM: served from the cache, with the explicit path's answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.schema import MetadataMode, NodeWithScore

from a3_engine import Chunk, FusionReport, Message
from a3_integrations.llama_index import A3LLM, A3Synthesizer
from tests.llama_index.conftest import events

pytestmark = pytest.mark.real_model
QUESTIONS = ["Who discovered the element oxygen?", "Through which countries does the Rhine flow?"]


def share_from_cache(llm: A3LLM, report: FusionReport, nodes: Sequence[NodeWithScore]) -> float:
    """Share of the retrieved nodes' tokens that were read from the cache."""
    count = llm.engine.runtime.planner.chunk_ids
    retrieved = sum(len(count(node.node.get_content(MetadataMode.LLM))) for node in nodes)
    return sum(chunk.n_tokens for chunk in report.chunks if chunk.hit) / retrieved


def explicit(messages: Sequence[ChatMessage], nodes: Sequence[NodeWithScore]) -> list[Message]:
    """The same conversation, with each node handed over as a chunk."""
    texts = [node.node.get_content(MetadataMode.LLM).strip() for node in nodes]
    conversation = []
    for message in messages:
        parts: list[str | Chunk] = []
        rest = message.content
        while found := sorted((rest.find(text), text) for text in texts if text in rest):
            at, text = found[0]
            parts += [rest[:at], Chunk(text)]
            rest = rest[at + len(text) :]
        conversation.append(Message(message.role.value, [*parts, rest]))
    return conversation


def test_stock_query_engine(llm, index):
    stock = index.as_query_engine(llm=llm, similarity_top_k=3)
    own = index.as_query_engine(
        llm=llm, similarity_top_k=3, response_synthesizer=A3Synthesizer(llm)
    )
    for question in QUESTIONS:
        response = stock.query(question)
        served = llm.last_report
        assert share_from_cache(llm, served, response.source_nodes) >= 0.8
        assert str(response) == str(own.query(question))
        assert served.trace.prompt.ids == llm.last_report.trace.prompt.ids


@pytest.mark.parametrize("engine_type", [ContextChatEngine, CondensePlusContextChatEngine])
@pytest.mark.parametrize("reset", [True, False], ids=["new conversation", "next turn"])
def test_stock_chat_engines(llm, index, engine_type, reset):
    chat = engine_type.from_defaults(retriever=index.as_retriever(similarity_top_k=3), llm=llm)
    for question in QUESTIONS:
        with events() as seen:
            response = chat.chat(question)
        served = llm.last_report
        if reset:
            chat.reset()
    assert share_from_cache(llm, served, response.source_nodes) >= 0.8
    messages = [event for event in seen if isinstance(event, LLMChatStartEvent)][-1].messages
    conversation = explicit(messages, response.source_nodes)
    # Under a name of its own no turn is known, as none was when the question was asked.
    prompt = llm.engine.runtime.planner.plan(conversation, match=False, conversation="again")
    assert prompt.ids == served.trace.prompt.ids
    again = llm.engine.generate(prompt, max_new_tokens=llm.max_new_tokens)
    assert again.report.hits == served.hits == len(response.source_nodes)
    assert again.text == str(response)


def test_a_chat_goes_on_with_the_turn_before(llm, index):
    """Same context, longer history: only the new words are computed. Other context: fused."""
    chat = ContextChatEngine.from_defaults(
        retriever=index.as_retriever(similarity_top_k=2), llm=llm
    )
    chat.chat(QUESTIONS[0])
    first = llm.last_report
    assert first.reused_turn_tokens == 0
    same = chat.chat(QUESTIONS[0])
    second = llm.last_report
    assert [node.node_id for node in same.source_nodes] == [
        node.node_id for node in chat._retriever.retrieve(QUESTIONS[0])
    ]
    assert second.reused_turn_tokens >= first.prompt_tokens
    assert second.fresh_tokens < 60
    assert share_from_cache(llm, second, same.source_nodes) == 1.0
    chat.chat(QUESTIONS[1])
    third = llm.last_report
    assert third.reused_turn_tokens == 0
    assert third.hits == 2


def test_an_exact_chat_answers_as_without_kept_turns(llm, index):
    """Full prefill over a kept turn, through the framework, equals full prefill of everything."""
    llm.selector = "full_prefill"
    chat = ContextChatEngine.from_defaults(
        retriever=index.as_retriever(similarity_top_k=2), llm=llm
    )
    answers, prompts = [], []
    for _ in range(2):
        answers.append(str(chat.chat(QUESTIONS[1])))
        prompts.append(llm.last_report.trace.prompt)
    assert llm.last_report.reused_turn_tokens > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        llm.engine.runtime.prefix_cache.clear()
        alone = llm.engine.generate(prompt, selector="full_prefill", max_new_tokens=8)
        assert alone.report.reused_turn_tokens == 0
        assert alone.text == answer
