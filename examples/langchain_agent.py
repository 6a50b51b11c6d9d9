"""A LangChain agent with a retriever tool; what the tool finds is read from the cache."""

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel, Field
from wordllama_langchain import WordLlamaEmbeddings

from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.langchain import ChatA3

llm = ChatA3(model="smollm2-135m-instruct", dtype="float32", max_tokens=64)
store = InMemoryVectorStore(WordLlamaEmbeddings())
store.add_documents(
    [
        Document(page_content=paragraph, metadata={"title": title})
        for title, paragraphs in articles(sample_examples())
        for paragraph in paragraphs
    ]
)
search = create_retriever_tool(
    store.as_retriever(search_kwargs={"k": 4}),
    "search",
    "Search for facts.",
    response_format="content_and_artifact",  # the artifact says where each document begins
)


class Words(BaseModel):
    """A small model may not come to an end: the grammar limits its letters."""

    query: str = Field(max_length=40)


search.args_schema = Words


@wrap_model_call
def search_first(request, handler):
    """Small models do not decide well when to search; larger ones need no such help."""
    if not any(isinstance(message, ToolMessage) for message in request.messages):
        request = request.override(tool_choice="any")
    return handler(request)


agent = create_agent(llm, [search], middleware=[search_first])
question = {"messages": [("human", "Where does the Middle Rhine flow?")]}
for run in ("The first run stores what it finds", "the second reads it"):
    messages = agent.invoke(question)["messages"]
    details = messages[-1].usage_metadata["input_token_details"]
    print(f"{run}: {details['cache_creation']} tokens stored, {details['cache_read']} read.")
print("\nSearched for:", messages[1].tool_calls[0]["args"]["query"])
print("Answer:", messages[-1].text)
