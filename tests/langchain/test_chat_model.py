"""Laws of the chat model: one answer by every way, numbers that add up, stops, cancellation."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel, ValidationError

from a3_engine import A3Engine
from a3_integrations.langchain import A3LLM, ChatA3
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "The lighthouse stands on the northern shore and its lamp burns through the night."
COUNT = "Count from one to twenty in words."


def with_document(text: str = TEXT, question: str = "What burns?") -> list[HumanMessage]:
    block = {"type": "text-plain", "mime_type": "text/plain", "text": text, "id": "lamp"}
    return [HumanMessage([block, question])]


@pytest.mark.real_model
def test_every_way_gives_the_same_answer(llm):
    messages = with_document()
    expected = llm.invoke(messages)

    async def asynchronously() -> list[str]:
        return [
            (await llm.ainvoke(messages)).content,
            "".join([chunk.content async for chunk in llm.astream(messages)]),
            *[answer.content for answer in await llm.abatch([messages, messages])],
        ]

    texts = [
        "".join(chunk.content for chunk in llm.stream(messages)),
        *[answer.content for answer in llm.batch([messages, messages])],
        *asyncio.run(asynchronously()),
    ]
    assert set(texts) == {expected.content}
    assert expected.content.strip()
    streamed = list(llm.stream(messages))
    assert sum(bool(chunk.usage_metadata) for chunk in streamed) == 1
    assert streamed[-1].usage_metadata["output_tokens"] == expected.usage_metadata["output_tokens"]


@pytest.mark.real_model
def test_usage_adds_up_and_says_what_the_cache_did(llm):
    llm.engine.evict("lamp")
    first, second = llm.invoke(with_document()), llm.invoke(with_document())
    n_chunk = len(llm.get_token_ids(TEXT))
    for message in (first, second):
        usage, report = message.usage_metadata, message.response_metadata["a3"]
        details = usage["input_token_details"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens"] == sum(details.values()) + report["fresh_tokens"]
        assert usage["input_tokens"] == llm.get_num_tokens_from_messages(with_document())
        assert usage["output_tokens"] <= 12
        assert message.response_metadata["model_name"] == llm.model
    assert first.usage_metadata["input_token_details"]["cache_creation"] >= n_chunk
    assert second.usage_metadata["input_token_details"]["cache_creation"] == 0
    assert second.usage_metadata["input_token_details"]["cache_read"] >= n_chunk
    counter = UsageMetadataCallbackHandler()
    llm.batch([with_document()] * 2, {"callbacks": [counter]})
    assert (
        counter.usage_metadata[llm.model]["input_tokens"]
        == 2 * first.usage_metadata["input_tokens"]
    )


@pytest.mark.real_model
def test_stop_words_never_appear(llm):
    whole = llm.invoke(COUNT, max_tokens=40)
    word = whole.content.split()[3]
    for stopped in (
        llm.invoke(COUNT, max_tokens=40, stop=[word]),
        llm.bind(stop=[word], max_tokens=40).invoke(COUNT),
        ChatA3(engine=llm.engine, max_tokens=40, stop=[word]).invoke(COUNT),
    ):
        assert stopped.content == whole.content[: whole.content.index(word)]
        assert stopped.response_metadata["finish_reason"] == "stop"
    assert llm.invoke(COUNT, max_tokens=3).response_metadata["finish_reason"] == "length"


def seconds_until_free(llm: ChatA3) -> float:
    started = time.perf_counter()
    while llm.engine.runtime.decoder._requests:
        time.sleep(0.01)
    return time.perf_counter() - started


@pytest.mark.real_model
def test_leaving_a_stream_stops_the_computation(llm):
    endless = {"max_tokens": 2000, "temperature": 2.0}
    stream = llm.stream(COUNT, **endless)
    next(stream)
    stream.close()
    assert seconds_until_free(llm) < 3

    async def cancel() -> None:
        task = asyncio.create_task(llm.ainvoke(COUNT, **endless))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert seconds_until_free(llm) < 3


@pytest.mark.real_model
def test_the_event_loop_stays_free(llm):
    async def ticks() -> int:
        task = asyncio.create_task(llm.ainvoke(COUNT, max_tokens=20))
        count = 0
        while not task.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(ticks()) > 10


@pytest.mark.real_model
def test_log_probabilities_in_the_form_of_openai(llm):
    silent = llm.invoke(COUNT)
    assert "logprobs" not in silent.response_metadata
    asked = ChatA3(engine=llm.engine, max_tokens=12, logprobs=True, top_logprobs=2)
    streamed = None
    for chunk in llm.bind(logprobs=True, top_logprobs=2).stream(COUNT):
        streamed = chunk if streamed is None else streamed + chunk
    for answer in (asked.invoke(COUNT), streamed):
        content = answer.response_metadata["logprobs"]["content"]
        assert answer.content == silent.content == "".join(entry["token"] for entry in content)
        assert len(content) == answer.usage_metadata["output_tokens"]
        for entry in content:
            first, second = entry["top_logprobs"]  # greedy: the likeliest is what was chosen
            assert {name: entry[name] for name in first} == first
            assert 0 >= entry["logprob"] >= second["logprob"]
            assert bytes(entry["bytes"]).decode() == entry["token"]
    completion = A3LLM(engine=llm.engine, max_tokens=3, logprobs=True).generate([COUNT])
    info = completion.generations[0][0].generation_info
    assert len(info["logprobs"]["content"]) == 3


@pytest.mark.real_model
def test_profile_without_loading(llm):
    """By the engine's own count where one is given, and from the files of a model by name."""
    assert llm.profile["max_input_tokens"] == llm.engine.context_window
    by_name = ChatA3(model="smollm2-135m-instruct")
    assert by_name.engine._runtime is None
    assert by_name.profile == llm.profile | {"name": by_name.model}
    assert "max_input_tokens" not in ChatA3(model="no/such-model").profile
    SummarizationMiddleware(model=llm, trigger=("fraction", 0.8))  # refuses models without it


class Joke(BaseModel):
    setup: str
    funny: bool


@pytest.mark.real_model
@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_output_that_is_cut_off_is_an_error_or_told_with_the_raw_answer(llm, method):
    structured = llm.with_structured_output(Joke, method=method, include_raw=True)
    answer = structured.invoke("Tell a joke.")  # twelve tokens are too few for one
    assert answer["raw"].response_metadata["finish_reason"] == "length"
    assert answer["parsed"] is None


@pytest.mark.real_model
def test_an_agent_answers_in_the_providers_structured_output(llm):
    """LangChain asks for it in OpenAI's words, of a model whose profile has it."""

    class Length(BaseModel):
        metres: int

    llm = ChatA3(engine=llm.engine, max_tokens=24)
    agent = create_agent(llm, response_format=Length)
    state = agent.invoke({"messages": [("human", "The bridge is 40 metres long. How long is it?")]})
    assert isinstance(state["structured_response"], Length)
    assert not state["messages"][-1].tool_calls
    with pytest.raises(ValueError, match="response_format"):
        llm.invoke("Hi", response_format={"type": "xml"})


@pytest.mark.real_model
def test_a_forced_call_streams_as_it_is_invoked(llm):
    llm = llm.model_copy(update={"max_tokens": 40})

    def ring_bell(loud: bool) -> str:
        """Ring the bell."""
        return "ding"

    bound = llm.bind_tools([ring_bell], tool_choice="ring_bell")
    whole, streamed = bound.invoke("Ring it loudly."), None
    for chunk in bound.stream("Ring it loudly."):
        streamed = chunk if streamed is None else streamed + chunk
    (call,) = whole.tool_calls
    assert call["name"] == "ring_bell"
    assert isinstance(call["args"]["loud"], bool)
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    assert (whole.content, streamed.content) == ("", "")
    assert whole.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.real_model
def test_text_completion_takes_the_prompt_as_it_stands(llm):
    llm.precompute([], progress=False)
    completion = A3LLM(engine=llm.engine, max_tokens=6)
    chain = PromptTemplate.from_template("{context}\n\nQ: {question}\nA:") | completion
    inputs = {"context": TEXT, "question": "What burns?"}
    text = chain.invoke(inputs)
    assert text
    assert "".join(chain.stream(inputs)) == text == asyncio.run(chain.ainvoke(inputs))
    result = completion.generate([TEXT, "One, two,"])
    usage = result.generations[0][0].generation_info["usage_metadata"]
    assert usage["input_tokens"] == len(llm.get_token_ids(TEXT))


# Settings


def test_nothing_is_loaded_by_construction_and_equal_settings_share_an_engine():
    llm = ChatA3(model="no/such-model", temperature=0.5)
    assert llm.engine is A3LLM(model="no/such-model").engine
    assert llm.engine is not ChatA3(model="no/such-model", dtype="float16").engine
    configured = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    cooler, _ = configured.prepare({"configurable": {"t": 0.1}})
    assert (cooler.temperature, cooler.engine) == (0.1, llm.engine)


@pytest.mark.real_model
def test_a_batch_of_completions_decodes_together_in_the_order_of_the_prompts(llm):
    """Fewer forwards than one by one, and each answer is its own prompt's."""
    completion = A3LLM(engine=llm.engine, max_tokens=8)
    prompts = ["One, two, three,", "Monday, Tuesday,", COUNT]
    forwards = []
    hook = llm.engine.runtime.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        alone = [completion.invoke(prompt) for prompt in prompts]
        one_by_one = len(forwards)
        assert completion.batch(prompts) == alone
        together = len(forwards) - one_by_one
        assert asyncio.run(completion.abatch(prompts)) == alone
    finally:
        hook.remove()
    assert len(set(alone)) == 3
    assert together < one_by_one - 4
    assert len(forwards) - one_by_one - together < one_by_one - 4


@pytest.mark.parametrize("cls", [ChatA3, A3LLM])
def test_settings_survive_serialization_copying_and_pickling(cls):
    llm = cls(model="no/such-model", temperature=0.5, stop=["x"], ratio=0.3)
    for copied in (
        load(dumpd(llm), allowed_objects=[cls], valid_namespaces=["a3_integrations"]),
        pickle.loads(pickle.dumps(llm)),
        copy.deepcopy(llm),
        llm.model_copy(),
    ):
        assert copied._identifying_params == llm._identifying_params
        assert copied.engine is llm.engine


def test_an_engine_around_a_loaded_model_is_not_serialized_as_something_else(tiny_engine):
    llm = ChatA3(engine=tiny_engine())
    assert dumpd(llm)["type"] == "not_implemented"
    assert copy.deepcopy(llm).engine is llm.engine
    with pytest.raises(TypeError, match="name"):
        pickle.dumps(llm)


@pytest.mark.parametrize(
    "setting",
    [
        {"cache_dir": "/elsewhere"},
        {"dtype": "float16"},
        {"stand_in": "none"},
        {"size_limit": 1},
        {"model": "another"},
    ],
)
@pytest.mark.parametrize("cls", [ChatA3, A3LLM])
def test_settings_that_contradict_the_engine_are_refused(tiny_engine, cls, setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        cls(engine=tiny_engine(), **setting)
    engine = tiny_engine()
    assert cls(engine=engine, model=engine.name, cache_dir=str(engine.cache_dir)).engine is engine


@pytest.mark.parametrize("cls", [ChatA3, A3LLM])
def test_settings_of_compression_and_codec_reach_the_engine(tiny_engine, cls):
    llm = cls(engine=tiny_engine(), max_tokens=2, compression="snapkv", keep=0.5)
    asked = [[HumanMessage(TEXT)]] if cls is ChatA3 else [TEXT]
    result = llm.generate(asked).generations[0][0]
    info = result.message.response_metadata if cls is ChatA3 else result.generation_info
    assert info["a3"]["compression"] == "snapkv"
    assert cls(model="no/such-model", codec="int8").engine._settings["codec"] == "int8"
    own = cls(model="no/such-model", stand_in=["A passage."])
    assert own.engine._settings["stand_in"] == ("A passage.",)
    with pytest.raises(ValidationError, match="snapkv"):
        cls(model="no/such-model", compression="snap")
    with pytest.raises(ValidationError, match="int4"):
        cls(model="no/such-model", codec="int5")


def test_wrong_settings_name_what_is_there(tiny_engine):
    with pytest.raises(ValidationError, match="temprature"):
        ChatA3(temprature=0.1)
    with pytest.raises(ValidationError, match="mend"):
        ChatA3(selector="mends")
    llm = ChatA3(engine=tiny_engine())
    with pytest.raises(TypeError, match="max_tokens"):
        llm.invoke("Hi", max_token=3)
    with pytest.raises(ValueError, match="ring_bell"):
        llm.bind_tools([{"name": "ring_bell", "description": "Ring."}], tool_choice="ring")
    assert ChatA3(max_new_tokens=7).max_tokens == 7


def test_a_prompt_template_with_history_and_documents_reaches_the_engine(tmp_path):
    engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=tmp_path)
    llm = ChatA3(engine=engine, max_tokens=2)
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", "{ask}")])
    answer = (prompt | llm).invoke({"history": with_document(), "ask": "Why?"})
    assert answer.response_metadata["a3"]["misses"] == 1
    engine.close()
