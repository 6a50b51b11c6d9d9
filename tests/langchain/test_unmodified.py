"""Chains and agents with nothing of ours but the model are served from the cache."""

from __future__ import annotations

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.tools import create_retriever_tool

from a3_integrations.langchain import create_a3_documents_chain
from a3_integrations.langchain.documents import cut, to_blocks
from tests.langchain.conftest import N_RETRIEVED, Answers

pytestmark = pytest.mark.real_model
QUESTION = "Where does the Middle Rhine flow?"
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from this context:\n\n{context}"), ("human", "{input}")]
)
WITH_SOURCE = PromptTemplate.from_template("<doc {number}>{page_content}</doc>")


def served(message, documents, llm) -> bool:
    """Whether at least 80 % of the documents' tokens were read from the cache, and none missed."""
    plans = llm.engine.runtime.planner
    retrieved = sum(len(plans.chunk_ids(document.page_content)) for document in documents)
    read = message.usage_metadata["input_token_details"]["cache_read"] - len(plans.prefix_ids)
    assert message.response_metadata["a3"]["fused"]
    return read >= 0.8 * retrieved and message.response_metadata["a3"]["misses"] == 0


@pytest.mark.parametrize("document_prompt", [None, WITH_SOURCE])
def test_stuff_chain(llm, documents, document_prompt):
    llm.precompute(documents, progress=False)
    found, answers = documents[:N_RETRIEVED], Answers()
    stock = create_stuff_documents_chain(llm, PROMPT, document_prompt=document_prompt)
    explicit = create_a3_documents_chain(llm, PROMPT, document_prompt=document_prompt)
    inputs = {"input": QUESTION, "context": found}
    texts = [chain.invoke(inputs, {"callbacks": [answers]}) for chain in (stock, explicit)]
    assert texts[0] == texts[1] != ""
    reports = [message.response_metadata["a3"] for message in answers.messages]
    assert all(served(message, found, llm) for message in answers.messages)
    assert reports[0]["hits"] == reports[1]["hits"] == N_RETRIEVED
    assert reports[0]["prompt_tokens"] == reports[1]["prompt_tokens"]


@pytest.mark.parametrize("make", [create_stuff_documents_chain, create_a3_documents_chain])
def test_retrieval_chain(llm, retriever, documents, make):
    llm.precompute(documents, progress=False)
    answers = Answers()
    chain = create_retrieval_chain(retriever, make(llm, PROMPT))
    for question in ("What is the Rhine?", QUESTION):
        result = chain.invoke({"input": question}, {"callbacks": [answers]})
    assert served(answers.messages[-1], result["context"], llm)
    explicit = create_a3_documents_chain(llm, PROMPT)
    assert result["answer"] == explicit.invoke({"input": QUESTION, "context": result["context"]})


@wrap_model_call
def search_first(request, handler):
    """The demo model is too small to decide by itself; a forced call is LangChain's own setting."""
    if not any(isinstance(message, ToolMessage) for message in request.messages):
        request = request.override(tool_choice="any")
    return handler(request)


@pytest.mark.parametrize("response_format", ["content", "content_and_artifact"])
def test_agent_with_a_retriever_tool(llm, retriever, documents, response_format):
    llm = llm.model_copy(update={"max_tokens": 32})
    llm.engine.evict("Rhine")
    if response_format == "content":  # nothing but a string arrives: its texts have to be known
        llm.precompute(documents, progress=False)
    tool = create_retriever_tool(
        retriever, "search", "Search for facts.", response_format=response_format
    )
    agent = create_agent(llm, [tool], middleware=[search_first])
    ask = {"messages": [HumanMessage(QUESTION)]}
    agent.invoke(ask)
    answers = Answers()
    messages = agent.invoke(ask, {"callbacks": [answers]})["messages"]
    assert [m.type for m in messages] == ["human", "ai", "tool", "ai"]
    found = retriever.invoke(messages[1].tool_calls[0]["args"]["query"])
    assert served(messages[-1], found, llm)

    result = messages[2].model_copy(update={"artifact": None})
    result.content = to_blocks(cut(messages[2].content, found))
    explicit = llm.bind_tools([tool]).invoke([*messages[:2], result])
    assert explicit.content == messages[-1].content
