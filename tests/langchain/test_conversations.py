"""Histories of stock LangChain and LangGraph: read from the store though the documents change."""

from __future__ import annotations

from typing import Annotated, TypedDict

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages

from a3_engine.conversations import TAG
from a3_integrations.langchain import A3LLM, ChatA3

CONTEXTS = [f"In the year {1900 + n} keeper {n} lit the lamp of the lighthouse." for n in range(5)]
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Read: {context}"), MessagesPlaceholder("history"), ("human", "{input}")]
)


@pytest.fixture
def llm(tiny_engine) -> ChatA3:
    return ChatA3(engine=tiny_engine(), max_tokens=12)


def read(llm: ChatA3) -> int:
    """Tokens of earlier turns that the last request read, when its own turns are stored."""
    llm.engine.runtime.turns.settle()
    return llm.last_report.history_tokens


def test_a_message_history_is_one_conversation_by_its_session(llm):
    """Cut to its last messages, too, which a name makes up for."""
    histories: dict[str, InMemoryChatMessageHistory] = {}
    chain = RunnableWithMessageHistory(
        PROMPT | llm,
        lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="input",
        history_messages_key="history",
    )

    def ask(session: str, turn: int) -> int:
        inputs = {"context": CONTEXTS[turn], "input": f"Question {turn}: who lit the lamp then?"}
        chain.invoke(inputs, {"configurable": {"session_id": session}})
        return read(llm)

    found = [ask("Ann", turn) for turn in range(3)]
    assert found[0] == 0 < found[1] < found[2]
    assert llm.last_report.conversation == f"{TAG}Ann"
    assert ask("Bob", 0) == 0
    assert ask("Bob", 1) > 0
    del histories["Ann"].messages[:2]
    assert ask("Ann", 3) > 0
    assert llm.engine.evict(f"{TAG}Ann") > 0
    assert ask("Ann", 4) == 0


async def test_a_thread_of_a_graph_is_one_conversation(llm):
    class State(TypedDict):
        messages: Annotated[list[AnyMessage], add_messages]

    async def answer(state: State) -> State:
        context = SystemMessage(f"Read: {CONTEXTS[len(state['messages']) // 2]}")
        return {"messages": [await llm.ainvoke([context, *state["messages"]])]}

    graph = StateGraph(State).add_node("answer", answer).add_edge(START, "answer")
    agent = graph.compile(checkpointer=InMemorySaver())

    async def ask(thread: str) -> int:
        message = HumanMessage("Who lit the lamp of the lighthouse in that year?")
        await agent.ainvoke({"messages": [message]}, {"configurable": {"thread_id": thread}})
        return read(llm)

    assert [await ask("7") > 0 for _ in range(3)] == [False, True, True]
    assert llm.last_report.conversation == f"{TAG}7"
    assert await ask("8") == 0


def test_a_name_of_ones_own_goes_before(llm):
    messages = PROMPT.invoke({"context": CONTEXTS[0], "history": [], "input": "Who?"})
    thread = {"configurable": {"thread_id": "7"}}
    (RunnablePassthrough() | llm).invoke(messages, thread)
    assert llm.last_report.conversation == f"{TAG}7"
    (RunnablePassthrough() | llm.bind(conversation="Ann")).invoke(messages, thread)
    assert llm.last_report.conversation == f"{TAG}Ann"
    llm.bind(conversation="Bob").invoke(messages)
    assert llm.last_report.conversation == f"{TAG}Bob"
    llm.model_copy(update={"conversation": "Cid"}).invoke(messages)
    assert llm.last_report.conversation == f"{TAG}Cid"
    llm.invoke(messages)
    assert llm.last_report.conversation == ""


def test_a_text_model_takes_the_setting_and_has_no_turns(tiny_engine):
    llm = A3LLM(engine=tiny_engine(), max_tokens=4, conversation="Ann")
    llm.invoke("Who lit the lamp?")
    assert llm.last_report.conversation == ""
