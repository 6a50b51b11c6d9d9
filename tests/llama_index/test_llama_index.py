"""LlamaIndex on the real model: query engines are served from the cache, and stay what they are."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMChatStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeWithScore, TextNode

from a3_engine import A3Engine, ContextOverflowError
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform, A3Synthesizer
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.real_model
QUESTION = "How many species of trees can be found in the Amazon rainforest?"


@pytest.fixture
def llm(demo_engine: A3Engine) -> A3LLM:
    return A3LLM(engine=demo_engine, max_new_tokens=12)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    found = [pair for pair in articles(sample_examples()) if pair[0] in ("Oxygen", "Rhine")]
    return [Document(text="\n\n".join(texts), doc_id=title) for title, texts in found]


def ingest(llm: A3LLM, documents: list[Document]) -> VectorStoreIndex:
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=128, chunk_overlap=10),
            A3PrecomputeTransform(llm, show_progress=False),
        ]
    )
    return VectorStoreIndex(pipeline.run(documents=documents), embed_model=MockEmbedding(8))


def test_synthesizer_serves_every_node_from_the_cache(llm, documents):
    index = ingest(llm, documents)
    engine = index.as_query_engine(
        llm=llm, similarity_top_k=4, response_synthesizer=A3Synthesizer(llm)
    )
    response = engine.query(QUESTION)
    report = llm.last_report
    assert report.fused
    assert len(response.source_nodes) == 4 == report.hits
    assert report.misses == 0
    assert str(response)


def test_stock_query_engine_gives_the_same_answer_from_the_cache(llm, documents):
    """Nothing of ours but the LLM: nodes are found in the finished prompt by their text."""
    index = ingest(llm, documents)
    own = index.as_query_engine(
        llm=llm, similarity_top_k=4, response_synthesizer=A3Synthesizer(llm)
    )
    expected = str(own.query(QUESTION))
    stock = index.as_query_engine(llm=llm, similarity_top_k=4)
    assert str(stock.query(QUESTION)) == expected
    assert llm.last_report.hits == 4
    assert llm.last_report.cached_tokens > 0.6 * llm.last_report.prompt_tokens


def test_nodes_that_were_never_precomputed_are_stored_by_the_first_question(llm):
    text = "The old mill at Dunmore ground its last corn in 1911, on a wet morning in October. " * 3
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0)]
    synthesizer = A3Synthesizer(llm)
    first = synthesizer.synthesize("When did the mill stop?", nodes)
    assert llm.last_report.misses == 1
    again = synthesizer.synthesize("When did the mill stop?", nodes)
    assert llm.last_report.hits == 1
    assert str(first) == str(again)


def test_streaming_and_async_give_the_same_text(llm, documents):
    index = ingest(llm, documents)
    nodes = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    whole = A3Synthesizer(llm).synthesize(QUESTION, nodes)
    streamed = A3Synthesizer(llm, streaming=True).synthesize(QUESTION, nodes)
    assert "".join(streamed.response_gen) == str(whole)
    assert [n.node_id for n in streamed.source_nodes] == [n.node_id for n in nodes]

    async def ask() -> tuple[str, str]:
        plain = await A3Synthesizer(llm).asynthesize(QUESTION, nodes)
        stream = await A3Synthesizer(llm, streaming=True).asynthesize(QUESTION, nodes)
        return str(plain), "".join([piece async for piece in stream.async_response_gen()])

    assert asyncio.run(ask()) == (str(whole), str(whole))


def test_more_nodes_than_the_context_holds_are_answered_in_groups(demo_engine):
    """Whole nodes are grouped, and every group's tokens fit beside the answer."""
    llm = A3LLM(engine=demo_engine, max_new_tokens=8)
    limit = 900
    texts = [p for _, paragraphs in articles(sample_examples()) for p in paragraphs][:8]
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
    synthesizer = A3Synthesizer(llm, response_padding_size=50)
    synthesizer._prompt_helper.context_window = limit
    groups = synthesizer._make_compact_text_chunks(QUESTION, texts)
    assert len(groups) > 1
    assert "\n\n".join(groups) == "\n\n".join(text.strip() for text in texts)
    response = synthesizer.synthesize(QUESTION, nodes)
    assert llm.last_report.prompt_tokens <= limit
    assert len(response.source_nodes) == len(nodes)


def test_a_prompt_beyond_the_context_window_is_an_error_not_an_empty_response(demo_engine):
    llm = A3LLM(engine=demo_engine, max_new_tokens=8)
    with pytest.raises(ContextOverflowError, match="8192"):
        llm.complete("word " * 9000)


def test_all_eight_endpoints_agree(llm):
    prompt = "Name a colour of the rainbow."
    messages = [ChatMessage(role=MessageRole.USER, content=prompt)]

    async def asynchronous() -> list[str]:
        return [
            (await llm.acomplete(prompt)).text,
            [r async for r in await llm.astream_complete(prompt)][-1].text,
            (await llm.achat(messages)).message.content,
            [r async for r in await llm.astream_chat(messages)][-1].message.content,
        ]

    texts = [
        llm.complete(prompt).text,
        list(llm.stream_complete(prompt))[-1].text,
        llm.chat(messages).message.content,
        list(llm.stream_chat(messages))[-1].message.content,
        *asyncio.run(asynchronous()),
    ]
    assert len(set(texts)) == 1
    assert texts[0].strip()
    deltas = [r.delta for r in llm.stream_chat(messages)]
    assert "".join(deltas) == texts[0]


def test_callbacks_and_instrumentation_count_once(demo_engine):
    """TokenCountingHandler sees the model's own counts, and one start and end event a call."""
    counter = TokenCountingHandler()
    llm = A3LLM(engine=demo_engine, max_new_tokens=5)
    llm.callback_manager = CallbackManager([counter])
    seen = []

    class Handler(BaseEventHandler):
        def handle(self, event, **_):
            seen.append(type(event))

    dispatcher = get_dispatcher()
    handler = Handler()
    dispatcher.add_event_handler(handler)
    try:
        response = llm.chat([ChatMessage(role="user", content="Count to three.")])
    finally:
        dispatcher.event_handlers.remove(handler)
    usage = response.raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"] <= 5
    assert seen.count(LLMChatStartEvent) == seen.count(LLMChatEndEvent) == 1


def test_stop_and_max_tokens_are_taken_per_call(llm):
    assert llm.complete("Count: one, two,", max_tokens=3).raw["usage"]["completion_tokens"] == 3
    full = llm.complete("Say: red, green, blue.").text
    stop = full[3:6]
    assert llm.complete("Say: red, green, blue.", stop=[stop]).text == full[: full.find(stop)]
    with pytest.raises(TypeError, match="takes no nonsense"):
        llm.complete("hello", nonsense=1)


def test_log_probabilities_for_a_call_and_as_a_field(llm):
    messages = [ChatMessage(role="user", content=QUESTION)]
    silent = llm.chat(messages)
    assert silent.logprobs is None
    (*_, streamed) = llm.stream_chat(messages, logprobs=True, top_logprobs=2)
    assert "".join(best.token for best, _ in streamed.logprobs) == silent.message.content
    assert all(0 >= best.logprob >= second.logprob for best, second in streamed.logprobs)
    alone = A3LLM(engine=llm.engine, max_new_tokens=12, logprobs=True).chat(messages)
    assert alone.logprobs == [[best] for best, _ in streamed.logprobs]


def test_compression_and_codec_reach_the_engine(llm):
    answer = llm.complete(QUESTION, compression="snapkv", keep=0.5)
    assert answer.raw["a3"]["compression"] == "snapkv"
    assert A3LLM(model="no/such-model", codec="int8").engine._settings["codec"] == "int8"
    with pytest.raises(ValueError, match="snapkv"):
        A3LLM(model="no/such-model", compression="snap")
    with pytest.raises(ValueError, match="codec"):
        A3LLM(engine=llm.engine, codec="int8")


def test_images_are_refused_with_a_way_out(llm):
    message = ChatMessage(role="user", blocks=[ImageBlock(image=b"x")])
    with pytest.raises(ValueError, match="text"):
        llm.chat([message])


def test_metadata_tells_what_prompt_helpers_need(llm):
    assert llm.metadata.context_window == 8192
    assert llm.metadata.num_output == 12
    assert llm.metadata.is_chat_model


def test_settings_llm_is_used_by_the_synthesizer(llm, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", llm)
    assert A3Synthesizer()._llm is llm
    with pytest.raises(TypeError, match="A3LLM"):
        A3Synthesizer(MockLLM())


def test_deleting_a_document_evicts_its_chunks(llm, documents):
    ingest(llm, documents)
    before = llm.engine.stats().entries
    assert llm.engine.evict("Rhine") > 0
    assert llm.engine.stats().entries < before
    ingest(llm, documents)
    assert llm.engine.stats().entries == before


def test_transform_pickles_and_its_key_follows_the_model(tmp_path: Path):
    """Ingestion caches compute anew when the model changes; a worker process gets a recipe."""
    nodes = [TextNode(text="some text")]
    engines = [
        A3Engine.from_pretrained(tiny_model(name), tiny_tokenizer(), cache_dir=tmp_path)
        for name in ("llama", "llama", "qwen2")
    ]
    keys = [get_transformation_hash(nodes, A3PrecomputeTransform(engine)) for engine in engines]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(TypeError, match="name"):
        pickle.dumps(A3PrecomputeTransform(engines[0]))

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    transform = A3PrecomputeTransform(
        A3LLM(str(tmp_path / "model"), cache_dir=str(tmp_path / "store")), show_progress=False
    )
    copy = pickle.loads(pickle.dumps(transform))
    assert copy.fingerprint == transform.fingerprint
    text = "The lighthouse stands on the northern shore and its lamp burns."
    copy([TextNode(text=text)])
    report = transform._engine.generate(text + " Why?", max_new_tokens=2).report
    assert report.hits == 1
