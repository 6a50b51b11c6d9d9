"""What other models, middleware and stores leave after: histories, options, ids, artifacts."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core import exceptions
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.prompts import PromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel
from transformers import GPT2Config

from a3_engine import A3Engine, ContextOverflowError
from a3_engine.decoding.grammar import FollowGrammar
from a3_integrations.langchain import A3LLM, A3VectorStore, ChatA3, create_a3_documents_chain
from a3_integrations.langchain.messages import to_engine
from tests.tiny import LONG, STAND_IN, tiny_model, tiny_tokenizer

TEXT = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."
CALL = {"name": "keeper", "args": {"of": "lamp"}, "id": "call_1", "type": "tool_call"}
SAID = {
    "plain": "said",
    "text": {"type": "text", "text": "said"},
    "openai": {"type": "output_text", "text": "said", "annotations": []},
    "refusal": {"type": "refusal", "refusal": "said"},
    "json": {"type": "json", "json": {"said": 1}},
    "document": {"type": "document", "source": {"type": "text", "data": "said"}},
    "file": {
        "type": "file",
        "mime_type": "text/plain",
        "base64": base64.b64encode(b"said").decode(),
    },
    "own": {"type": "non_standard", "value": {"type": "text", "text": "said"}},
    "search": {"type": "search_result", "content": [{"type": "text", "text": "said"}]},
}
LEFT_OUT = [
    {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
    {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
    {"type": "server_tool_call", "id": "1", "name": "web_search", "args": {}},
    {"type": "server_tool_result", "tool_call_id": "1", "status": "success"},
    {"type": "web_search_call", "id": "1", "status": "completed"},
    {"type": "reasoning", "reasoning": "thought"},
    {"type": "reasoning_content", "reasoning_content": {"text": "thought"}},
    {"type": "thinking", "thinking": "thought", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    {"cachePoint": {"type": "default"}},
    {"type": "cachePoint"},
    {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    {"type": "non_standard", "value": {"anything": 1}},
    {"type": "code_interpreter_call", "id": "1"},
    {"type": "unheard_of"},
]
REFUSED = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    {"type": "image", "base64": "AA", "mime_type": "image/png"},
    {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    {"type": "video", "url": "https://example.com/x"},
    {"type": "file", "base64": "AA", "mime_type": "application/pdf"},
    {"type": "document", "source": {"type": "base64", "data": "AA"}},
    {"type": "media", "data": "AA", "mime_type": "audio/mp3"},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    engine = A3Engine.from_pretrained(
        tiny_model(LONG), tiny_tokenizer(), cache_dir=folder, stand_in=STAND_IN
    )
    yield ChatA3(engine=engine, max_tokens=2)
    engine.close()


@pytest.mark.parametrize("block", SAID)
def test_what_another_model_said_is_kept(llm, block):
    (turn,) = to_engine([AIMessage([SAID[block]])])
    assert "said" in turn.text
    llm.invoke([HumanMessage("Who?"), AIMessage([SAID[block]]), HumanMessage("And now?")])


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: block.get("type", "mark"))
def test_what_belongs_to_another_model_is_left_out(llm, block):
    (turn,) = to_engine([AIMessage([block, {"type": "text", "text": "said"}])])
    assert turn.text == "said"
    llm.invoke([HumanMessage("Who?"), AIMessage([block]), HumanMessage("And now?")])


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block["type"])
def test_what_is_seen_or_heard_is_refused(llm, block):
    with pytest.raises(ValueError, match="reads text"):
        llm.invoke([HumanMessage(["What is that?", block])])


BLOCKS = st.sampled_from([*SAID.values(), *LEFT_OUT, *REFUSED])
CONTENT = st.one_of(st.sampled_from(["", " ", "Who?"]), st.lists(BLOCKS, max_size=3))
MESSAGES = st.one_of(
    CONTENT.map(HumanMessage),
    CONTENT.map(SystemMessage),
    st.builds(lambda c, n: AIMessage(c, tool_calls=[CALL] * n), CONTENT, st.integers(0, 2)),
    CONTENT.map(lambda c: ToolMessage(c, tool_call_id="call_1")),
)


@given(st.lists(MESSAGES, max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_history_gives_a_prompt_or_a_clear_refusal(llm, history):
    """Whatever blocks it is made of, in whatever order its turns come."""
    try:
        n_tokens = llm.get_num_tokens_from_messages(history)
    except ValueError as error:
        refusals = ("reads text", "The chat template")
        assert str(error).startswith(tuple(refusals)) or "reads text" in str(error)  # noqa: PT017
    else:
        assert (n_tokens > 0) == bool(history)


def test_counting_and_trimming_take_any_message(llm):
    """As middleware and memories do it, message by message and in parts."""
    history = [
        SystemMessage("You keep the lamp."),
        HumanMessage(TEXT),
        AIMessage("", tool_calls=[CALL]),
        ToolMessage("The keeper.", tool_call_id="call_1"),
        AIMessage(""),
        HumanMessage(""),
        HumanMessage("And now?"),
    ]
    assert llm.get_num_tokens_from_messages([]) == 0
    assert all(llm.get_num_tokens_from_messages([message]) > 0 for message in history)
    for limit in (20, 60, 200):
        for strategy in ("first", "last"):
            trimmed = trim_messages(
                history,
                token_counter=llm,
                max_tokens=limit,
                strategy=strategy,
                allow_partial=True,
            )
            assert llm.get_num_tokens_from_messages(trimmed) <= limit


def test_options_are_read_as_by_other_models(llm):
    engine = llm.engine
    plain = llm.invoke("Who?").content
    for kind in (ChatA3, A3LLM):
        given = kind(engine=engine, max_tokens=2, temperature=None, stop="zzz", top_p=None)
        assert given.stop == ["zzz"]
        expected = given.invoke("Who?")
        again = given.invoke("Who?", temperature=None, max_tokens=None, seed=None)
        assert getattr(again, "content", again) == getattr(expected, "content", expected)
        given.invoke("Who?", temperature=1, top_p=1, repetition_penalty=1)
    assert llm.invoke("Who?", stop="zzz").content == plain


def test_an_overflow_is_langchains_too(llm):
    """Middleware that summarizes or falls back goes by LangChain's class."""
    many = [HumanMessage("word " * 40_000)]
    for error in (exceptions.ContextOverflowError, ContextOverflowError):
        with pytest.raises(error):
            llm.invoke(many)
        with pytest.raises(error):
            A3LLM(engine=llm.engine).invoke("word " * 40_000)


async def test_an_overflow_is_langchains_too_on_an_event_loop(llm):
    with pytest.raises(exceptions.ContextOverflowError):
        await llm.ainvoke([HumanMessage("word " * 40_000)])


def test_a_chain_without_documents_or_words_answers(llm):
    chain = create_a3_documents_chain(llm, PromptTemplate.from_template("{context}"))
    assert isinstance(chain.invoke({"context": []}), str)


def test_documents_are_known_when_they_come_back_as_plain_values(llm):
    """From a checkpoint, after an interrupt."""
    document = Document(page_content=TEXT, metadata={"source": "a"}, id="1")
    for artifact in ([document], [document.model_dump()]):
        message = ToolMessage(f"Found:\n{TEXT}", tool_call_id="1", artifact=artifact)
        (turn,) = to_engine([message])
        assert [getattr(part, "tag", None) for part in turn.parts] == [None, "1"]


class NoIds(InMemoryVectorStore):
    def add_documents(self, documents, **kwargs):
        super().add_documents(documents, **kwargs)

    def add_texts(self, texts, *args, **kwargs):
        return []


def test_a_store_that_tells_no_ids_is_wrapped_too(llm):
    store = A3VectorStore(NoIds(DeterministicFakeEmbedding(size=8)), llm, show_progress=False)
    assert store.add_documents([Document(page_content=TEXT, id="doc")]) is None
    assert llm.engine.evict("doc") >= 1  # the chunk, and its first tokens where they open a prompt
    assert store.add_texts([TEXT]) == []


def test_a_tool_is_shown_as_it_is_written(llm):
    def hüter(name: str) -> str:
        """Sagt, wer das Leuchtfeuer hütet."""
        return name

    schema = llm.bind_tools([hüter]).kwargs["tools"]
    prompt = llm.engine.runtime.planner.plan(to_engine([HumanMessage("Wer?")]), tools=schema)
    shown = llm.engine.runtime.tokenizer.decode(prompt.ids)
    assert "Sagt, wer das Leuchtfeuer hütet." in shown
    assert "\\u00" not in shown


class Tree(BaseModel):
    """A branch, and what grows from it."""

    name: str
    children: list[Tree]


class Odd(BaseModel):
    """Fields that the grammar has no rule for."""

    words: set[str]
    path: Path
    counts: dict[Literal["a", "b"], int]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("schema", [Tree, Odd])
def test_any_schema_is_compiled_and_followed(llm, schema, method):
    """What holds itself is followed; what has no rule is left free, and checked afterwards."""
    bound = llm.with_structured_output(schema, method=method, include_raw=True)
    answered = bound.invoke("Who?")
    assert answered["raw"].content is not None


def test_what_holds_itself_is_shown_and_forced(llm):
    from a3_engine.tools import call_grammar
    from a3_integrations.langchain.tools import to_schema

    tool = to_schema(Tree)
    assert '"items": {}' not in str(tool).replace("'", '"')
    for tools in ([tool], [tool, to_schema(Odd), tool]):
        answer = llm.engine.generate("Who?", max_new_tokens=40, grammar=call_grammar(tools))
        assert answer.text.startswith('<tool_call>\n{"name":')
    follow = FollowGrammar(llm.engine.runtime.tokenizer, call_grammar([tool]), [2])
    call = '{"name":"Tree","arguments":{"name":"a","children":[{"name":"b","children":[%s]}]}}'
    for child, fits in (("", True), ('{"name":"c","children":[]}', True), ("5", False)):
        matcher = follow._matcher.deep_copy()
        text = f"<tool_call>\n{call % child}\n</tool_call>"
        ids = llm.engine.runtime.planner.tokenize_text(text)
        assert (matcher.validate_tokens(list(ids)) == len(ids)) == fits


def test_the_window_of_a_given_model_is_in_the_profile(llm):
    assert llm.profile["max_input_tokens"] == LONG.max_position_embeddings


def test_an_ordinary_prefill_warns_of_nothing(llm, recwarn, caplog):
    llm.invoke("Who?", selector="full_prefill")
    engine = llm.engine
    refused = A3Engine.from_pretrained(
        tiny_model(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)),
        tiny_tokenizer(),
        cache_dir=engine.cache_dir,
        stand_in=STAND_IN,
    )
    refused.generate("Who?", max_new_tokens=2)
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "top_k" not in said
    refused.close()


@pytest.mark.parametrize("before", ["Hi ", "", "Read this.\n\n", f"{TEXT[:40]} "])
def test_a_completion_may_end_in_a_stored_text(llm, before):
    """Its last token is computed; a prompt that is one text is a question, and no chunk."""
    llm.precompute([Document(page_content=TEXT)], progress=False)
    completion = A3LLM(engine=llm.engine, max_tokens=3, selector="mend", ratio=1.0)
    exact = A3LLM(engine=llm.engine, max_tokens=3, selector="full_prefill")
    answer = completion.generate([before + TEXT]).generations[0][0]
    assert answer.generation_info["a3"]["chunks"] == bool(before)
    assert answer.text == exact.invoke(before + TEXT)
    assert completion.invoke(before + TEXT) == answer.text
