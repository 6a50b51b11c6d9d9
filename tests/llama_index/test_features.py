"""What people use around an LLM in LlamaIndex, each on the real model."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest
from llama_index.core import Document, QueryBundle, Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.evaluation import (
    BatchEvalRunner,
    FaithfulnessEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
)
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import (
    LongContextReorder,
    MetadataReplacementPostProcessor,
    SimilarityPostprocessor,
)
from llama_index.core.query_engine import (
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
)
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.schema import TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import SimpleVectorStore
from pydantic import BaseModel

from a3_engine import A3Engine
from a3_integrations.llama_index import (
    A3LLM,
    A3DocumentStore,
    A3PrecomputeTransform,
    A3Synthesizer,
)
from tests.llama_index.conftest import Words, events

pytestmark = pytest.mark.real_model
QUESTION = "Who discovered the element oxygen?"
RHINE = "Through which countries does the Rhine flow?"


@pytest.fixture
def query_engine(llm: A3LLM, index: VectorStoreIndex) -> RetrieverQueryEngine:
    return index.as_query_engine(
        llm=llm, similarity_top_k=3, response_synthesizer=A3Synthesizer(llm)
    )


def tools(engine) -> list[QueryEngineTool]:
    return [
        QueryEngineTool.from_defaults(engine, name="oxygen", description="the element oxygen"),
        QueryEngineTool.from_defaults(engine, name="rhine", description="the river Rhine"),
    ]


def test_rerankers_reorder_without_a_miss(llm, index):
    """Chunks are served in whatever order a postprocessor leaves them."""
    retriever = index.as_retriever(similarity_top_k=4)
    plain = retriever.retrieve(QUESTION)
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=llm,
        response_synthesizer=A3Synthesizer(llm),
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.0), LongContextReorder()],
    )
    response = engine.query(QUESTION)
    order = [node.node_id for node in response.source_nodes]
    assert order != [node.node_id for node in plain]
    assert sorted(order) == sorted(node.node_id for node in plain)
    texts = [node.node.get_content().strip() for node in response.source_nodes]
    assert [chunk.text for chunk in llm.last_report.chunks] == texts
    assert (llm.last_report.hits, llm.last_report.misses) == (4, 0)


def test_a_postprocessor_that_replaces_texts_is_served_after_the_first_time(llm):
    """As with sentence windows, what the model reads is not what was embedded."""
    window = "The mill by the bridge burned down in 1902, and nobody built it up again. " * 2
    node = TextNode(text="It burned down.", metadata={"window": window})
    node.excluded_llm_metadata_keys = ["window"]
    engine = VectorStoreIndex([node], embed_model=Words()).as_query_engine(
        llm=llm,
        response_synthesizer=A3Synthesizer(llm),
        node_postprocessors=[MetadataReplacementPostProcessor("window")],
    )
    engine.query("When did it burn?")
    assert (llm.last_report.hits, llm.last_report.misses) == (0, 1)
    engine.query("What burned?")
    assert (llm.last_report.hits, llm.last_report.misses) == (1, 0)
    assert llm.last_report.chunks[0].text == window.strip()


def test_router_query_engine(llm, query_engine):
    """The model itself selects; whatever it picks is answered from the cache."""
    llm.max_new_tokens = 64
    router = RouterQueryEngine.from_defaults(
        tools(query_engine), llm=llm, selector=LLMSingleSelector.from_defaults(llm=llm)
    )
    response = router.query(QUESTION)
    assert {selection.index for selection in response.metadata["selector_result"].selections} <= {
        0,
        1,
    }
    assert response.source_nodes
    assert str(response)


class GivenQuestions(BaseQuestionGenerator):
    """Writing sub-questions as JSON is beyond the demo model; answering them is not."""

    def generate(self, tools, query: QueryBundle) -> list[SubQuestion]:
        return [
            SubQuestion(sub_question=QUESTION, tool_name="oxygen"),
            SubQuestion(sub_question=RHINE, tool_name="rhine"),
        ]

    async def agenerate(self, tools, query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts) -> None:
        pass


@pytest.mark.parametrize("use_async", [False, True])
def test_sub_question_query_engine(llm, query_engine, use_async):
    engine = SubQuestionQueryEngine.from_defaults(
        tools(query_engine),
        llm=llm,
        question_gen=GivenQuestions(),
        response_synthesizer=A3Synthesizer(llm),
        use_async=use_async,
        verbose=False,
    )
    with events() as seen:
        response = engine.query("Compare oxygen and the Rhine.")
    ends = [event for event in seen if isinstance(event, LLMChatEndEvent)]
    served = [event.response.raw["a3"] for event in ends]
    assert len(served) == 3
    assert sum(report["hits"] == 3 for report in served) == 2  # what the tools retrieved
    assert len(response.source_nodes) == 2 + 3 + 3


def test_condense_question_chat_engine(llm, query_engine):
    """It rewrites a follow-up by the model, and asks the query engine."""
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=llm)
    for question in (QUESTION, "When?"):
        response = chat.chat(question)
        assert str(response)
        assert llm.last_report.hits == 3
    streamed = chat.stream_chat("And why?")
    assert "".join(streamed.response_gen).strip() == chat.chat_history[-1].content.strip()
    assert llm.last_report.hits == 3


@pytest.mark.parametrize("mode", ["context", "condense_plus_context", "condense_question"])
def test_chat_modes_stream_and_run_async(llm, index, mode):
    """Through ``as_chat_engine``, with the answer kept in the history."""
    chat = index.as_chat_engine(chat_mode=mode, llm=llm, similarity_top_k=2)
    streamed = chat.stream_chat(QUESTION)
    text = "".join(streamed.response_gen)
    assert text.strip()
    assert llm.last_report.hits == 2
    chat.reset()

    async def ask() -> tuple[str, str]:
        whole = await chat.achat(QUESTION)
        chat.reset()
        pieces = await chat.astream_chat(QUESTION)
        return str(whole), "".join([piece async for piece in pieces.async_response_gen()])

    assert asyncio.run(ask()) == (text, text)
    assert [message.role.value for message in chat.chat_history] == ["user", "assistant"]


def test_settings_llm_serves_engines_made_without_one(llm, index, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", llm)
    assert index.as_query_engine(similarity_top_k=2).query(QUESTION).source_nodes
    assert llm.last_report.hits == 2
    report = llm.last_report
    index.as_chat_engine(chat_mode="context", similarity_top_k=2).chat(QUESTION)
    assert llm.last_report is not report
    assert llm.last_report.hits == 2


class Stated(BaseModel):
    """What a sentence says of a river."""

    river: Literal["Rhine", "Rhone", "Danube"]
    ends: bool


def test_structured_llm(demo_engine):
    """The answer fits the class; one without room for it is an error that says so."""
    llm = A3LLM(engine=demo_engine, max_new_tokens=64)
    answer = llm.as_structured_llm(Stated).complete("The Rhine ends in the North Sea.").raw
    assert isinstance(answer, Stated)
    llm = A3LLM(engine=demo_engine, max_new_tokens=8)
    with pytest.raises(ValueError, match="max_new_tokens"):
        llm.as_structured_llm(Stated).complete("Hello.")


def test_evaluators_judge_over_cached_chunks(demo_engine, query_engine):
    """The judge is the same model: it reads the same chunks, from the cache."""
    judge = A3LLM(engine=demo_engine, max_new_tokens=4)
    response = query_engine.query(QUESTION)
    result = FaithfulnessEvaluator(llm=judge).evaluate_response(response=response)
    assert result.passing == ("yes" in result.feedback.lower())
    assert judge.last_report.hits > 0

    runner = BatchEvalRunner(
        {"faithful": FaithfulnessEvaluator(llm=judge), "relevant": RelevancyEvaluator(llm=judge)},
        workers=2,
    )
    results = asyncio.run(runner.aevaluate_queries(query_engine, queries=[RHINE]))
    assert {name: len(rows) for name, rows in results.items()} == {"faithful": 1, "relevant": 1}
    for row in results["faithful"] + results["relevant"]:
        assert row.feedback
        assert row.response
        assert not row.invalid_result


def test_token_counts_of_chats_and_streams_are_the_models_own(demo_engine, index, monkeypatch):
    """What the handler adds up is what the model was given and gave, call by call."""
    counter = TokenCountingHandler()
    # Chat engines give the LLM the callbacks of the settings, whatever it had.
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter]))
    llm = A3LLM(engine=demo_engine, max_new_tokens=6)
    chat = index.as_chat_engine(chat_mode="condense_plus_context", llm=llm, similarity_top_k=2)
    with events() as seen:
        chat.chat(QUESTION)
        "".join(chat.stream_chat("When?").response_gen)
    ends = (LLMChatEndEvent, LLMCompletionEndEvent)
    usages = [event.response.raw["usage"] for event in seen if isinstance(event, ends)]
    assert len(usages) == 3  # the second question is condensed first
    assert [
        (count.prompt_token_count, count.completion_token_count)
        for count in counter.llm_token_counts
    ] == [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages]
    assert usages[-1]["prompt_tokens_details"]["cached_tokens"] > 0


def test_instrumentation_tells_a_query_from_retrieval_to_answer(query_engine):
    """Each stage once and in order; what the events carry can be written as JSON."""
    with events() as seen:
        response = query_engine.query(QUESTION)
    kinds = [type(event) for event in seen]
    stages = [RetrievalEndEvent, LLMChatStartEvent, LLMChatEndEvent, SynthesizeEndEvent]
    assert [kind for kind in kinds if kind in stages] == stages
    (end,) = (event for event in seen if isinstance(event, LLMChatEndEvent))
    assert json.loads(json.dumps(end.response.raw))["a3"]["hits"] == 3
    assert len({event.span_id for event in seen}) > 1
    assert json.dumps(response.metadata)


def test_responses_are_explained(llm, query_engine, index):
    """By the report that they carry; a stock engine's response carries none and says so."""
    engine = llm.engine
    response = query_engine.query(QUESTION)
    assert response.metadata["a3"]["hits"] == 3
    assert engine.explain(response).report is llm.last_report
    assert asyncio.run(query_engine.aquery(QUESTION)).metadata["a3"]["hits"] == 3
    assert engine.explain(llm.complete("Hello.")).report is llm.last_report
    stock = index.as_query_engine(llm=llm, similarity_top_k=2).query(QUESTION)
    with pytest.raises(ValueError, match="last_report"):
        engine.explain(stock)
    explained = engine.explain(llm.last_report)
    assert explained.tokens["cached"] + explained.tokens["recomputed"] > 100


def ingestion(llm: A3LLM, docstore) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=64, chunk_overlap=0),
            Words(),
            A3PrecomputeTransform(llm, show_progress=False),
        ],
        docstore=docstore,
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        vector_store=SimpleVectorStore(),
    )


def note(name: str, words: str) -> Document:
    return Document(text=f"Note on the {name}: {words} " * 4, doc_id=name)


def known(llm: A3LLM, document: Document) -> int:
    """Chunks of a document that are served from the cache."""
    return llm.complete(document.text, max_tokens=1).raw["a3"]["hits"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ingestion_evicts_what_it_deletes_and_replaces(llm, tmp_path, asynchronous):
    store = A3DocumentStore(llm, SimpleDocumentStore())
    pipeline = ingestion(llm, store)

    def run(*documents: Document) -> int:
        if asynchronous:
            return len(asyncio.run(pipeline.arun(documents=documents)))
        return len(pipeline.run(documents=documents))

    mill = note("mill", f"it ground corn until 1911, in the valley. {asynchronous}")
    ferry = note("ferry", f"it crossed the sound twice a day, in summer. {asynchronous}")
    assert run(mill, ferry) > 0
    assert known(llm, mill) > 0
    assert known(llm, ferry) > 0
    entries = llm.engine.stats().entries
    assert run(mill, ferry) == 0  # nothing changed: nothing to do, nothing lost
    assert llm.engine.stats().entries == entries

    newer = note("mill", f"it was turned into a museum in 1983, by the town. {asynchronous}")
    run(newer, ferry)
    assert known(llm, mill) == 0
    assert known(llm, newer) > 0
    run(newer)
    assert known(llm, ferry) == 0
    assert known(llm, newer) > 0
    store.persist(str(tmp_path / "documents.json"))
    again = SimpleDocumentStore.from_persist_path(str(tmp_path / "documents.json"))
    assert list(again.docs) == ["mill"]


def test_the_document_store_wraps_key_value_stores_only(llm):
    with pytest.raises(TypeError, match="evict"):
        A3DocumentStore(llm, object())


@pytest.mark.parametrize(
    "field",
    [
        {"cache_dir": "x"},
        {"encode_prefix": "bos"},
        {"stand_in": "none"},
        {"size_limit": 5},
        {"model": "other"},
    ],
)
def test_an_engine_and_what_it_decides_are_a_contradiction(demo_engine: A3Engine, field):
    with pytest.raises(ValueError, match=f"engine and {next(iter(field))}"):
        A3LLM(engine=demo_engine, **field)
    assert A3LLM(demo_engine.name, engine=demo_engine).model == demo_engine.name


def test_a_stand_in_reaches_the_engine():
    own = A3LLM("no/such-model", stand_in=["A passage.", "Another."])
    assert own.engine._settings["stand_in"] == ("A passage.", "Another.")
    with pytest.raises(ValueError, match="stand_in is"):
        A3LLM("no/such-model", stand_in="A passage.")
