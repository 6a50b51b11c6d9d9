"""Tools: shown by any template, called in any notation, forced by grammar, used by agents."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from transformers import LlamaConfig

from a3_engine import A3Engine
from a3_engine.tools import MARKS
from a3_integrations.llama_index import A3LLM, A3Synthesizer
from a3_integrations.llama_index.tools import to_schema
from tests.engine.test_tools import CALLED, JSON, KNOWING, MARKED
from tests.llama_index.conftest import events
from tests.tiny import CHATML, SHAPE, STAND_IN, tiny_model, tiny_tokenizer

LONG = {**SHAPE, "max_position_embeddings": 4096, "vocab_size": 340, "num_hidden_layers": 2}
END = 2
# Whole phrases as tokens: what is said is said in few steps.
PHRASES = [*JSON, *(json.dumps(call.arguments) for call in CALLED[:1]), "find_keeper", "ring_bell"]


def find_keeper(year: int, place: str) -> str:
    """Find a keeper."""
    return f"Ada kept the lamp at the {place} in {year}."


def ring_bell() -> str:
    """Ring the bell."""
    return "ding"


class Light(BaseModel):
    """How a lamp burns."""

    lit: bool


class Shore(BaseModel):
    """A shore and its lights."""

    near: Light
    place: Literal["pier", "mole"]


TOOLS = [FunctionTool.from_defaults(find_keeper), FunctionTool.from_defaults(ring_bell)]


class Script:
    """Makes a tiny model say one text after the other: its logits name the next token."""

    def __init__(self, engine: A3Engine) -> None:
        self._tokenizer = engine.runtime.tokenizer
        self._ids: list[int] = []
        engine.runtime.model.lm_head.register_forward_hook(self._next_token)

    def write(self, *answers: str) -> None:
        ids = [self._tokenizer(text, add_special_tokens=False).input_ids for text in answers]
        self._ids = [token for answer in ids for token in (*answer, END)]

    def _next_token(self, _module, _given, logits):
        logits[..., -1, self._ids.pop(0)] = 1e4
        return logits


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """LLMs that say what they are told."""
    made: dict[tuple[str, bool], tuple[A3Engine, Script]] = {}

    def build(*answers: str, template: str = CHATML, special: bool = False) -> A3LLM:
        if (template, special) not in made:
            tokenizer = tiny_tokenizer(template)
            tokenizer.add_tokens(PHRASES)
            if special:
                tokenizer.add_special_tokens(
                    {"additional_special_tokens": ["<|im_start|>", *MARKS]},
                    replace_extra_special_tokens=False,
                )
            engine = A3Engine.from_pretrained(
                tiny_model(LlamaConfig(**LONG)),
                tokenizer,
                cache_dir=tmp_path_factory.mktemp("tools"),
                stand_in=STAND_IN,
            )
            made[template, special] = engine, Script(engine)
        engine, script = made[template, special]
        script.write(*answers)
        return A3LLM(engine=engine, selector="full_prefill")

    yield build
    for engine, _ in made.values():
        engine.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forced")
    engine = A3Engine.from_pretrained(
        tiny_model(LlamaConfig(**LONG | {"vocab_size": 320})),
        tiny_tokenizer(),
        cache_dir=folder,
        stand_in=STAND_IN,
    )
    yield engine
    engine.close()


@pytest.fixture
def llm(engine) -> A3LLM:
    """Tiny and random: only a grammar makes sense of what it says."""
    return A3LLM(engine=engine, max_new_tokens=150)


def shown(llm: A3LLM) -> str:
    """The last prompt, as the model read it."""
    return llm.engine.runtime.tokenizer.decode(llm.last_report.trace.prompt.ids)


def called(llm: A3LLM, response) -> list[tuple[str, dict]]:
    found = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    assert len({call.tool_id for call in found}) == len(found)
    return [(call.tool_name, call.tool_kwargs) for call in found]


EXPECTED = [(call.name, dict(call.arguments)) for call in CALLED]


@pytest.mark.parametrize("special", [True, False], ids=["control tokens", "plain tokens"])
@pytest.mark.parametrize("notation", MARKED)
def test_calls_are_read_in_every_notation(scripted, notation, special):
    """Two calls after words; one of them where a single one is asked for."""
    said = "I look. " + "".join(MARKED[notation])
    llm = scripted(said, said, special=special)
    assert called(llm, llm.chat_with_tools(TOOLS, "Who?")) == EXPECTED[:1]
    streamed = list(llm.stream_chat_with_tools(TOOLS, "Who?", allow_parallel_tool_calls=True))
    assert "".join(piece.delta for piece in streamed) == "I look. "
    assert (streamed[-1].message.content, called(llm, streamed[-1])) == ("I look. ", EXPECTED)


def test_async_twins_answer_alike(scripted):
    llm = scripted(*["".join(MARKED["hermes"])] * 2)

    async def both():
        whole = await llm.achat_with_tools(TOOLS, "Who?", allow_parallel_tool_calls=True)
        stream = await llm.astream_chat_with_tools(TOOLS, "Who?", allow_parallel_tool_calls=True)
        return whole, [piece async for piece in stream][-1]

    assert [called(llm, response) for response in asyncio.run(both())] == [EXPECTED] * 2


def test_what_only_looks_like_a_call_is_text(scripted):
    broken = '<tool_call>{"name": "find_keeper", "argu'
    llm = scripted(broken, broken)
    assert '"argu' in llm.chat_with_tools(TOOLS, "Who?").message.content
    with pytest.raises(ValueError, match="no whole tool call"):
        llm.predict_and_call(TOOLS, "Who?")


@pytest.mark.parametrize("given", [{"tool_required": True}, {"tool_choice": "light"}])
def test_a_forced_call_fits_whatever_the_model_would_say(llm, given):
    tools = [FunctionTool.from_defaults(Shore, name="light", fn_schema=Shore)]
    (first,) = called(llm, llm.chat_with_tools(tools, "Who?", **given))
    (*_, last) = llm.stream_chat_with_tools(tools, "Who?", **given)
    assert [first] == called(llm, last)
    assert first[0] == "light"
    assert Shore(**first[1])


def test_a_tool_that_is_not_there_is_refused(llm):
    with pytest.raises(ValueError, match=r"names no tool.*find_keeper, ring_bell"):
        llm.chat_with_tools(TOOLS, "Who?", tool_choice="ring")


def test_no_tool_is_shown_or_called_where_none_may_be(scripted):
    said = MARKED["hermes"][0]
    llm = scripted(said)
    answer = llm.chat_with_tools(TOOLS, "Who?", tool_choice="none")
    assert answer.message.content == said
    assert "ring_bell" not in shown(llm)


def test_tools_and_a_prompt_of_ones_own_exclude_each_other(llm):
    own = A3LLM(engine=llm.engine, messages_to_prompt=lambda messages: str(messages))
    assert llm.metadata.is_function_calling_model
    assert isinstance(llm, FunctionCallingLLM)
    assert not own.metadata.is_function_calling_model
    with pytest.raises(ValueError, match="messages_to_prompt"):
        own.chat_with_tools(TOOLS, "Who?")


def test_predict_and_call_calls(scripted):
    llm = scripted(*["".join(MARKED["hermes"])] * 2)
    answer = llm.predict_and_call(TOOLS, "Who?", allow_parallel_tool_calls=True)
    assert answer.response == "Ada kept the lamp at the shore in 1911.\n\nding"
    answer = asyncio.run(llm.apredict_and_call(TOOLS, "Who?"))
    assert answer.response == "Ada kept the lamp at the shore in 1911."


HISTORY = [
    ChatMessage(role="user", content="Who keeps the lamp?"),
    ChatMessage(
        role="assistant",
        blocks=[
            TextBlock(text="I look."),
            ToolCallBlock(tool_call_id="a1", tool_name="find_keeper", tool_kwargs={"year": 1911}),
            ToolCallBlock(tool_call_id="b2", tool_name="ring_bell", tool_kwargs="{}"),
        ],
    ),
    ChatMessage(role="tool", content="Ada.", additional_kwargs={"tool_call_id": "a1"}),
    ChatMessage(role="tool", content="ding", additional_kwargs={"tool_call_id": "b2"}),
]
# Writes the name of the tool that answered, as Gemma's and gpt-oss's do.
NAMING = KNOWING.replace("{{ message.content }}", "{{ message.name }}: {{ message.content }}")


def test_a_history_with_calls_is_written_as_the_template_writes_it(scripted):
    llm = scripted("Ada.", template=NAMING)
    llm.chat_with_tools(TOOLS, chat_history=HISTORY)
    turns = [
        {"role": "user", "name": "", "content": "Who keeps the lamp?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"function": {"name": "find_keeper", "arguments": {"year": 1911}}},
                {"function": {"name": "ring_bell", "arguments": {}}},
            ],
        },
        {"role": "tool", "name": "find_keeper", "content": "Ada."},
        {"role": "tool", "name": "ring_bell", "content": "ding"},
    ]
    assert shown(llm) == llm.engine.runtime.tokenizer.apply_chat_template(
        turns,
        tools=[to_schema(tool) for tool in TOOLS],
        tokenize=False,
        add_generation_prompt=True,
    )


def test_a_template_without_tools_gets_them_spelled_out(scripted):
    llm = scripted("Ada.")
    llm.chat_with_tools(TOOLS, chat_history=HISTORY)
    text = shown(llm)
    order = ["Find a keeper.", "Who keeps", '{"year": 1911}', "<tool_response>\nAda.", "ding"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize(("make", "streaming"), [("agent", True), ("workflow", False)])
def test_an_agent_calls_reads_and_answers(scripted, make, streaming):
    """Two calls at once, then a tool that is not there, then the answer."""
    wrong = '<tool_call>{"name": "row_boat", "arguments": {}}</tool_call>'
    llm = scripted("".join(MARKED["hermes"]), wrong, "Ada kept it.")
    agent = FunctionAgent(llm=llm, tools=TOOLS, streaming=streaming, system_prompt="Be brief.")
    if make == "workflow":
        agent = AgentWorkflow(agents=[agent])

    async def run():
        return await agent.run("Who kept the lamp in 1911?")

    output = asyncio.run(run())
    assert str(output) == "Ada kept it."
    assert [call.tool_name for call in output.tool_calls] == [
        "find_keeper",
        "ring_bell",
        "row_boat",
    ]
    results = ["Ada kept the lamp at the shore in 1911.", "ding", "row_boat not found"]
    places = [shown(llm).index(text) for text in results]
    assert places == sorted(places)


def test_an_agents_first_call_can_be_forced(llm):
    agent = FunctionAgent(llm=llm, tools=TOOLS, initial_tool_choice="ring_bell")

    async def run():
        return await agent.run("Ring it.", max_iterations=3)

    llm.max_new_tokens = 80
    assert asyncio.run(run()).tool_calls[0].tool_name == "ring_bell"


def test_structured_answers_fit_whatever_the_model_would_say(llm):
    """Whole and streamed, by the prompt's way and by the wrapped LLM."""
    prompt = PromptTemplate("Is it {how}?")
    whole = llm.structured_predict(Shore, prompt, how="lit")
    assert isinstance(whole, Shore)
    assert list(llm.stream_structured_predict(Shore, prompt, how="lit"))[-1] == whole

    async def streamed():
        stream = await llm.astream_structured_predict(Shore, prompt, how="lit")
        return [partial async for partial in stream]

    assert asyncio.run(streamed())[-1] == whole
    assert llm.as_structured_llm(Shore).complete("Is it lit?").raw == whole


def test_events_carry_plain_values_and_come_once(scripted):
    counter = TokenCountingHandler()
    llm = scripted("".join(MARKED["hermes"]), "".join(MARKED["hermes"]))
    llm.callback_manager = CallbackManager([counter])
    with events() as seen:
        response = llm.chat_with_tools(TOOLS, "Who?")
        list(llm.stream_chat_with_tools(TOOLS, "Who?"))
    starts = [event for event in seen if type(event).__name__ == "LLMChatStartEvent"]
    ends = [event for event in seen if type(event).__name__ == "LLMChatEndEvent"]
    assert (len(starts), len(ends)) == (2, 2)
    assert json.loads(json.dumps(starts[0].additional_kwargs))["tools"][1]["function"]["name"]
    assert (
        response.raw["usage"]["completion_tokens"]
        == ends[1].response.raw["usage"]["completion_tokens"]
    )
    counts = [(c.prompt_token_count, c.completion_token_count) for c in counter.llm_token_counts]
    usage = response.raw["usage"]
    assert counts == [(usage["prompt_tokens"], usage["completion_tokens"])] * 2


def test_a_synthesizer_sends_what_a_stock_one_sends(llm):
    """The same events in the same order, and the same counts."""
    llm.max_new_tokens = 4
    text = "The lamp of the lighthouse burns through the night, and the keeper sleeps."
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0)]
    seen, counts = [], []
    for make in (get_response_synthesizer, A3Synthesizer):
        counter = TokenCountingHandler(tokenizer=llm.engine.runtime.planner.tokenize_text)
        llm.callback_manager = CallbackManager()
        synthesizer = make(llm=llm, callback_manager=CallbackManager([counter]))
        with events() as sent:
            synthesizer.synthesize("Who?", nodes)
        seen.append([type(event).__name__ for event in sent])
        counts.append(
            [(c.prompt_token_count, c.completion_token_count) for c in counter.llm_token_counts]
        )
    assert seen[0] == seen[1]
    assert counts[0] == counts[1] != []
