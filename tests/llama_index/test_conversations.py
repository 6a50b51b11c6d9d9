"""Histories of stock chat engines and agents: read from the store though the documents change."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.memory import Memory
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from transformers import LlamaConfig

from a3_engine.conversations import TAG
from a3_integrations.llama_index import A3LLM
from tests.tiny import SHAPE

CONTEXTS = [f"In the year {1900 + n} keeper {n} lit the lamp of the lighthouse." for n in range(5)]


class Next(BaseRetriever):
    """Another passage at every turn."""

    turn = -1

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.turn += 1
        return [NodeWithScore(node=TextNode(text=CONTEXTS[self.turn]), score=1.0)]


@pytest.fixture
def llm(tiny_engine) -> A3LLM:
    engine = tiny_engine(LlamaConfig(**{**SHAPE, "max_position_embeddings": 8192}))
    engine.precompute(CONTEXTS, progress=False)
    return A3LLM(engine=engine, max_new_tokens=8)


def read(llm: A3LLM) -> int:
    llm.engine.runtime.turns.settle()
    return llm.last_report.history_tokens


def context(llm: A3LLM, **options: object) -> ContextChatEngine:
    return ContextChatEngine.from_defaults(Next(), llm=llm, **options)


def condensed(llm: A3LLM, **options: object) -> CondensePlusContextChatEngine:
    return CondensePlusContextChatEngine.from_defaults(Next(), llm=llm, **options)


@pytest.mark.parametrize("make", [context, condensed])
def test_a_stock_chat_engine_reads_its_history(llm, make):
    """It names no conversation: what was said does."""
    chat = make(llm, memory=Memory.from_defaults(token_limit=4000))
    found = []
    for turn in range(4):
        chat.chat(f"Question {turn}: who lit the lamp of the lighthouse then?")
        assert llm.last_report.hits == 1
        found.append(read(llm))
    assert found[:2] == [0, 0]
    assert 0 < found[2] < found[3]


def test_a_field_or_a_call_names_the_conversation(llm):
    message = [ChatMessage("Who lit the lamp of the lighthouse in that year?")]
    llm.chat(message)
    assert llm.last_report.conversation == ""
    llm.chat(message, conversation="Bob")
    assert llm.last_report.conversation == f"{TAG}Bob"
    llm.conversation = "Ann"
    llm.chat(message)
    assert llm.last_report.conversation == f"{TAG}Ann"
    llm.complete("Who lit the lamp?")
    assert llm.last_report.conversation == ""
