"""A small index over real articles, retrieved by words, its nodes' KV computed at ingestion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.node_parser import SentenceSplitter

from a3_engine import A3Engine
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform


class Words(BaseEmbedding):
    """Hashed bags of words: texts with words in common are near."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.0] * 256
        for word in re.findall(r"\w{4,}", text.lower()):
            vector[crc32(word.encode()) % 256] += 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@pytest.fixture
def llm(demo_engine: A3Engine) -> A3LLM:
    demo_engine.runtime.prefix_cache.clear()
    return A3LLM(engine=demo_engine, max_new_tokens=8)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    found = [pair for pair in articles(sample_examples()) if pair[0] in ("Oxygen", "Rhine")]
    return [Document(text="\n\n".join(texts), doc_id=title) for title, texts in found]


@pytest.fixture(scope="session")
def index(demo_engine: A3Engine, documents: list[Document]) -> VectorStoreIndex:
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=128, chunk_overlap=0),
            A3PrecomputeTransform(demo_engine, show_progress=False),
        ]
    )
    return VectorStoreIndex(pipeline.run(documents=documents), embed_model=Words())


@contextmanager
def events() -> Iterator[list[BaseEvent]]:
    """The instrumentation events of a block."""
    seen: list[BaseEvent] = []

    class Handler(BaseEventHandler):
        def handle(self, event: BaseEvent, **_: object) -> None:
            seen.append(event)

    dispatcher, handler = get_dispatcher(), Handler()
    dispatcher.add_event_handler(handler)
    try:
        yield seen
    finally:
        dispatcher.event_handlers.remove(handler)
