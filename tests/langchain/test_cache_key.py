"""LangChain's caches: an answer serves another request only where all that decides is alike."""

from __future__ import annotations

import pickle

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from a3_engine import A3Engine
from a3_engine.fusion.selectors.epic import Epic
from a3_integrations.langchain import A3LLM, ChatA3
from tests.tiny import LONG, STRICT, tiny_model, tiny_tokenizer

ASK = "The lamp of the lighthouse burns. Who keeps it?"


@pytest.fixture
def cache():
    found = InMemoryCache()
    set_llm_cache(found)
    yield found
    set_llm_cache(None)


SETTINGS = [
    {"max_tokens": 3},
    {"max_tokens": 4},
    {"max_tokens": 3, "ratio": 0.1},
    {"max_tokens": 3, "ratio": 0.9},
    {"max_tokens": 3, "selector": "full_prefill"},
    {"max_tokens": 3, "compression": "snapkv"},
    {"max_tokens": 3, "compression": "snapkv", "keep": 0.1},
    {"max_tokens": 3, "temperature": 0.5},
    {"max_tokens": 3, "temperature": 0.5, "seed": 1},
    {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9},
    {"max_tokens": 3, "temperature": 0.5, "top_k": 9},
    {"max_tokens": 3, "repetition_penalty": 1.3},
    {"max_tokens": 3, "stop": ["."]},
    {"max_tokens": 3, "logprobs": True},
    {"max_tokens": 3, "logprobs": True, "top_logprobs": 2},
]


@pytest.mark.parametrize("kind", [ChatA3, A3LLM])
@pytest.mark.parametrize("given", ["at construction", "in the call"])
def test_no_two_settings_that_can_give_two_answers_share_a_key(cache, tiny_engine, kind, given):
    """And settings that are alike do, however they were given."""
    engine = tiny_engine()
    for settings in SETTINGS:
        if given == "in the call":
            kind(engine=engine).invoke(ASK, **settings)
        else:
            kind(engine=engine, **settings).invoke(ASK)
    assert len(cache._cache) == len(SETTINGS)
    again = tiny_engine()
    for settings in SETTINGS:
        kind(engine=again, **settings).invoke(ASK)
    assert len(cache._cache) == len(SETTINGS)


@pytest.mark.parametrize("kind", [ChatA3, A3LLM])
async def test_no_two_engines_that_can_give_two_answers_share_a_key(cache, tiny_engine, kind):
    engines = [
        tiny_engine(),
        tiny_engine("mistral"),
        tiny_engine(encode_prefix="bos"),
        tiny_engine(codec="int4"),
        tiny_engine(ratio=0.9),
        tiny_engine(selector=Epic()),
        tiny_engine(selector=Epic(first=3)),
        tiny_engine(compression="snapkv"),
    ]
    for engine in engines:
        await kind(engine=engine, max_tokens=2).ainvoke(ASK)
    assert len(cache._cache) == len(engines)


def test_another_chat_template_has_another_key(cache, tmp_path, tiny_engine):

    other = A3Engine.from_pretrained(
        tiny_model("llama"), tiny_tokenizer(STRICT), cache_dir=tmp_path
    )
    for engine in (tiny_engine(), other):
        ChatA3(engine=engine, max_tokens=2).invoke(ASK)
    assert len(cache._cache) == 2
    other.close()


def test_tools_are_part_of_the_key(cache, tiny_engine):
    llm = ChatA3(engine=tiny_engine(LONG), max_tokens=2)

    def keeper(name: str) -> str:
        """Says who keeps a lamp."""
        return name

    def ship(name: str) -> str:
        """Says where a ship is."""
        return name

    for tools in ([keeper], [ship], [keeper, ship], [keeper]):
        llm.bind_tools(tools).invoke(ASK)
    llm.invoke(ASK)
    assert len(cache._cache) == 4


def test_a_pickled_model_has_the_same_key(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"cache_dir": str(tmp_path / "kv"), "codec": "int8", "ratio": 0.3}
    llm = ChatA3(model=str(tmp_path / "model"), **settings)
    again = pickle.loads(pickle.dumps(llm))
    assert again._get_llm_string() == llm._get_llm_string()
