"""An LLM that is pickled or copied answers as the first one, or does not travel."""

from __future__ import annotations

import copy
import pickle

import pytest
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document

from a3_engine import A3Engine
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."
OTHER = "The northern shore is steep, and few boats land there before the ice is broken."


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_that_was_given_does_not_travel(tiny_engine):
    """Another one, loaded by its name, would answer in its place."""
    for llm in (A3LLM(engine=tiny_engine()), A3LLM(engine=tiny_engine(), temperature=0.5)):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(llm)


def test_an_llm_made_by_name_travels_with_all_its_settings(folder, tmp_path):
    """Those of its engine too, also where the engine was made first."""
    of_engine = {"cache_dir": tmp_path / "kv", "codec": "int8", "ratio": 0.3, "selector": "epic"}
    engine = A3Engine.from_pretrained(folder, **of_engine)
    own = A3LLM(folder, cache_dir=str(tmp_path / "kv"), codec="int8", ratio=0.3, selector="epic")
    for llm in (A3LLM(engine=engine, max_new_tokens=5, stop=["x"]), own):
        again = pickle.loads(pickle.dumps(llm))
        assert again.to_dict() == llm.to_dict()
        assert again.engine.fingerprint == llm.engine.fingerprint
        assert again.engine.identity() == llm.engine.identity()
        assert again.complete(TEXT).text == llm.complete(TEXT).text


def test_a_copy_shares_the_engine(tiny_engine):
    llm = A3LLM(engine=tiny_engine(), max_new_tokens=3)
    for copied in (copy.deepcopy(llm), copy.copy(llm), llm.model_copy()):
        assert copied.engine is llm.engine
        assert copied.max_new_tokens == 3


def ingest(engine: A3Engine, cache: IngestionCache, *texts: str) -> None:
    IngestionPipeline(
        transformations=[SentenceSplitter(), A3PrecomputeTransform(engine, show_progress=False)],
        cache=cache,
    ).run(documents=[Document(text=text, doc_id=f"doc {n}") for n, text in enumerate(texts)])


def hits(engine: A3Engine, text: str) -> int:
    return engine.generate("Who sleeps?", chunks=[text], max_new_tokens=2).report.hits


@pytest.mark.parametrize("lost", ["nothing", "evicted", "another folder", "changed and back"])
def test_a_pipelines_cache_never_skips_what_is_not_stored(tiny_engine, tmp_path, lost):
    """Also where the cache was kept in a file."""
    engine, cache = tiny_engine(), IngestionCache()
    ingest(engine, cache, TEXT, OTHER)
    cache.persist(str(tmp_path / "cache.json"))
    cache = IngestionCache.from_persist_path(str(tmp_path / "cache.json"))
    if lost == "evicted":
        engine.evict("doc 0")
    elif lost == "another folder":
        engine = tiny_engine(cache_dir=tmp_path / "another")
    elif lost == "changed and back":
        ingest(engine, cache, OTHER, OTHER)
        engine.evict("doc 0")
    computed = []
    engine.precompute, real = lambda c, **o: computed.append(real(c, **o)), engine.precompute
    ingest(engine, cache, TEXT, OTHER)
    assert bool(computed) == (lost != "nothing")
    assert hits(engine, TEXT) == hits(engine, OTHER) == 1


def test_two_llms_of_one_name_share_the_weights(folder, tmp_path):
    """Whatever else they are set to; and as long as one of them lives."""
    from a3_integrations.langchain import ChatA3

    settings = {"cache_dir": str(tmp_path / "kv"), "dtype": "float32"}
    one = A3LLM(folder, **settings, temperature=0.7)
    two = A3LLM(folder, **settings, selector="epic", max_new_tokens=3)
    assert one.engine is two.engine is ChatA3(model=folder, **settings).engine
    assert A3LLM(folder, **settings, codec="int8").engine is not one.engine


async def test_the_first_answer_of_a_process_does_not_stop_the_event_loop(folder, tmp_path):
    """The model is loaded in a thread, and its metadata needs no weights."""
    import asyncio
    import time

    llm = A3LLM(folder, cache_dir=str(tmp_path / "kv"), max_new_tokens=2)
    answering = asyncio.create_task(llm.acomplete(TEXT))
    longest, last = 0.0, time.monotonic()
    while not answering.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert (await answering).text
    assert longest < 0.7
    other = A3LLM(folder, cache_dir=str(tmp_path / "kv2"))
    assert (other.metadata.context_window, other.metadata.is_chat_model) == (512, True)
    assert other.engine._runtime is None
    assert llm.metadata.context_window == 512
