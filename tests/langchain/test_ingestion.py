"""Documents and their chunks come and go together."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from a3_engine import A3Engine, Chunk, Message, Precomputed
from a3_integrations.langchain import A3Precompute, A3VectorStore, ChatA3
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [
    "The lighthouse stands on the northern shore and its lamp burns through the night.",
    "The harbour froze in 1987, and no boat left it for six weeks and three days.",
    "Ada keeps the lamp, as her mother did, and writes the weather down every evening.",
]


@pytest.fixture
def llm(tiny_engine) -> ChatA3:
    return ChatA3(engine=tiny_engine(), max_tokens=2)


def wrapped(llm: ChatA3) -> A3VectorStore:
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    return A3VectorStore(inner, llm, show_progress=False)


def stored(llm: ChatA3) -> list[bool]:
    """Which of the texts a plain prompt is served from the cache."""
    engine = llm.engine
    return [engine.generate(f"{text} Why?", max_new_tokens=1).report.hits == 1 for text in TEXTS]


def documents() -> list[Document]:
    return [
        Document(page_content=text, metadata={"source": str(i)}) for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_transformer_stores_what_passes_through_it(llm, asynchronous):
    given = documents()
    step = A3Precompute(llm, show_progress=False)
    passed = (
        asyncio.run(step.atransform_documents(given))
        if asynchronous
        else step.transform_documents(given)
    )
    assert passed == documents()
    assert stored(llm) == [True] * 3
    assert llm.precompute(given, progress=False) == Precomputed(computed=0, present=3)
    llm.engine.evict("1")  # the source
    assert stored(llm) == [True, False, True]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("cleanup", ["full", "incremental", "scoped_full"])
def test_what_the_indexing_api_deletes_is_evicted(llm, cleanup, asynchronous):
    records, store = InMemoryRecordManager(namespace="test"), wrapped(llm)
    records.create_schema()
    options = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}

    def run(given: list[Document]) -> dict:
        if asynchronous:
            return asyncio.run(aindex(given, records, store, **options))
        return index(given, records, store, **options)

    assert run(documents())["num_added"] == 3
    assert stored(llm) == [True] * 3
    assert run(documents())["num_skipped"] == 3
    changed = documents()
    changed[1].page_content = "The harbour never froze again in all the years that followed."
    result = run(changed)
    assert (result["num_added"], result["num_deleted"]) == (1, 1)
    assert stored(llm) == [True, False, True]


def test_deleting_by_hand_evicts_and_searching_is_the_wrapped_stores(llm):
    store = wrapped(llm)
    ids = store.add_texts(TEXTS)
    assert stored(llm) == [True] * 3
    assert {d.page_content for d in store.as_retriever().invoke("lamp")} == set(TEXTS)
    assert store.store is not store
    assert set(store.store.store) == set(ids)  # the in-memory store's own attribute
    store.delete(ids[:1])
    assert stored(llm) == [False, True, True]
    prompt = [Message("user", [Chunk(TEXTS[0]), "Why?"])]
    assert llm.engine.generate(prompt, max_new_tokens=1).report.misses == 1


def test_what_is_not_ours_is_refused(llm):
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    for build in (lambda: A3Precompute(inner), lambda: A3VectorStore(inner, inner)):
        with pytest.raises(TypeError, match="ChatA3"):
            build()
    with pytest.raises(NotImplementedError, match="add_texts"):
        A3VectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=8))


class TestStandard(VectorStoreIntegrationTests):
    """A wrapped store passes LangChain's suite for vector stores as the bare one does."""

    @pytest.fixture
    def vectorstore(self, tmp_path) -> VectorStore:
        engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=tmp_path)
        inner = InMemoryVectorStore(self.get_embeddings())
        yield A3VectorStore(inner, ChatA3(engine=engine), show_progress=False)
        engine.close()


def test_texts_in_place_of_documents_are_refused_by_name(tiny_engine):
    llm = ChatA3(engine=tiny_engine())
    for given in ("text", ["text"]):
        with pytest.raises(TypeError, match="list of Documents"):
            llm.precompute(given)
