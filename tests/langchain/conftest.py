"""Documents, and a chat model on the demo engine."""

from __future__ import annotations

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore

from a3_engine import A3Engine
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.langchain import ChatA3

N_RETRIEVED = 3


class Answers(BaseCallbackHandler):
    """Every message that a model answered with, wherever in a chain it stands."""

    def __init__(self) -> None:
        self.messages = []

    def on_llm_end(self, response, **_) -> None:
        self.messages.append(response.generations[0][0].message)


@pytest.fixture
def llm(demo_engine: A3Engine) -> ChatA3:
    return ChatA3(engine=demo_engine, max_tokens=12)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    texts = [p for title, texts in articles(sample_examples()) for p in texts if title == "Rhine"]
    return [
        Document(page_content=text[:400], metadata={"source": "Rhine", "number": number})
        for number, text in enumerate(texts[:4])
    ]


@pytest.fixture
def retriever(documents):
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
    store.add_documents(documents)
    return store.as_retriever(search_kwargs={"k": N_RETRIEVED})
