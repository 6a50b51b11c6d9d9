"""Hostile inputs to both adapters: an answer or a clear refusal, and then all is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode

from a3_engine import A3Engine, A3Error
from a3_integrations import langchain, llama_index
from tests.engine.test_hostile import ODD
from tests.texts import LAMP

REFUSALS = (TypeError, ValueError, A3Error)
ASK = "Who sleeps?"
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "A function.", "parameters": {"type": "object"}},
}


def calls(engine: A3Engine) -> Iterator[tuple[str, Callable[[], object]]]:
    """By name; odd values wherever an adapter takes one."""
    chat = langchain.ChatA3(engine=engine, max_tokens=2)
    text = langchain.A3LLM(engine=engine, max_tokens=2)
    llm = llama_index.A3LLM(engine=engine, max_new_tokens=2)
    synthesizer = llama_index.A3Synthesizer(llm)
    settings = (*("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed"),
                *("logprobs", "top_logprobs", "selector", "ratio", "quality", "compression"),
                *("keep", "nothing"))  # fmt: skip
    for place, odd in enumerate(ODD):
        each: dict[str, Callable[[Any], object]] = {
            "chat": lambda odd: chat.invoke([HumanMessage(ASK, additional_kwargs={"x": odd})]),
            "artifact": lambda odd: chat.invoke([ToolMessage("x", tool_call_id="1", artifact=odd)]),
            "block": lambda odd: chat.invoke([HumanMessage([{"type": "text", "text": odd}])]),
            "kind": lambda odd: chat.invoke([HumanMessage([{"type": odd, "text": ASK}])]),
            "plain": lambda odd: chat.invoke(
                [HumanMessage([{"type": "text-plain", "text": LAMP, "id": odd, "extras": odd}])]
            ),
            "call": lambda odd: chat.invoke(
                [AIMessage("", tool_calls=[{"name": "f", "args": {"x": odd}, "id": "1"}])]
            ),
            "tools": lambda odd: chat.invoke(ASK, tools=odd),
            "tool": lambda odd: chat.invoke(ASK, tools=[odd]),
            "bind": lambda odd: chat.bind_tools([odd]).invoke(ASK),
            "choice": lambda odd: chat.bind_tools([TOOL], tool_choice=odd).invoke(ASK),
            "function": lambda odd: chat.invoke(ASK, tools=[{"type": "function", "function": odd}]),
            "parameters": lambda odd: chat.invoke(
                ASK, tools=[{"type": "function", "function": {"name": "f", "parameters": odd}}]
            ),
            "named": lambda odd: chat.invoke(ASK, tools=[TOOL], tool_choice={"function": odd}),
            "format of": lambda odd: chat.invoke(
                ASK, response_format={"type": "json_schema", "json_schema": odd}
            ),
            "llama tools": lambda odd: llm.chat([ChatMessage(ASK)], tools=odd),
            "llama choice": lambda odd: llm.chat([ChatMessage(ASK)], tools=[TOOL], tool_choice=odd),
            "format": lambda odd: chat.invoke(ASK, response_format=odd),
            "schema": lambda odd: chat.with_structured_output(odd, method="json_schema"),
            "document": lambda odd: chat.precompute([odd], progress=False),
            "metadata": lambda odd: chat.precompute(
                [Document(page_content=LAMP, metadata={"source": odd})], progress=False
            ),
            "completion": lambda odd: text.invoke(ASK, stop=odd),
            "batch": lambda odd: text.generate([ASK], stop=odd),
            "llama chat": lambda odd: llm.chat([ChatMessage(ASK, additional_kwargs={"name": odd})]),
            "llama calls": lambda odd: llm.chat(
                [ChatMessage(ASK, role="assistant", additional_kwargs={"tool_calls": odd})]
            ),
            "llama complete": lambda odd: llm.complete(odd),
            "llama formatted": lambda odd: llm.complete(odd, formatted=True),
            "llama messages": lambda odd: llm.chat(odd),
            "node": lambda odd: synthesizer.synthesize(
                ASK, [NodeWithScore(node=TextNode(text=LAMP, metadata={"m": odd}), score=1.0)]
            ),
            "query": lambda odd: synthesizer.synthesize(odd, []),
        }
        for name, call in each.items():
            yield f"{name} {place}", lambda call=call, odd=odd: call(odd)
        for setting in settings:
            yield f"{setting} {place}", lambda s=setting, odd=odd: chat.invoke(ASK, **{s: odd})
            yield (
                f"new {setting} {place}",
                lambda s=setting, odd=odd: langchain.ChatA3(engine=engine, **{s: odd}),
            )
            yield (
                f"llama {setting} {place}",
                lambda s=setting, odd=odd: llm.complete(ASK, **{s: odd}),
            )
            yield (
                f"llama new {setting} {place}",
                lambda s=setting, odd=odd: llama_index.A3LLM(engine=engine, **{s: odd}),
            )


def attack(engine: A3Engine, step: int = 1) -> tuple[int, list[str]]:
    """Make the calls, each ``step``-th; returns how many, and what was foreign."""

    def reference() -> str:
        return engine.generate(ASK, chunks=[LAMP], max_new_tokens=4).text

    before, count, foreign = reference(), 0, []
    for place, (name, call) in enumerate(calls(engine)):
        if place % step:
            continue
        count += 1
        try:
            call()
        except REFUSALS as error:
            if "object has no attribute" in str(error):
                foreign.append(f"{name}: {error!r}")
        except Exception as error:
            foreign.append(f"{name}: {error!r}")
        if count % 25 == 0:
            assert reference() == before, name
    assert reference() == before
    return count, foreign
