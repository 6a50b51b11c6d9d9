"""A LangChain retrieval chain that answers from cached chunks. The second run starts warm."""

from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter
from wordllama_langchain import WordLlamaEmbeddings

from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.langchain import A3VectorStore, ChatA3, create_a3_documents_chain

# Your own: ChatA3(model="Qwen/Qwen2.5-1.5B-Instruct"), a local folder, or a .gguf file.
llm = ChatA3(model="smollm2-135m-instruct", max_tokens=48)

documents = [
    Document(page_content="\n\n".join(paragraphs), metadata={"title": title})
    for title, paragraphs in articles(sample_examples())
]
chunks = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=0).split_documents(documents)

# Computes each chunk's KV once, when it is added; it stays on disk until the chunk is deleted.
store = A3VectorStore(InMemoryVectorStore(WordLlamaEmbeddings()), llm)
store.add_documents(chunks)

prompt = ChatPromptTemplate.from_messages(
    [("human", "Context:\n\n{context}\n\nAnswer from the context in one sentence: {input}")]
)
chain = create_retrieval_chain(
    store.as_retriever(search_kwargs={"k": 8}), create_a3_documents_chain(llm, prompt)
)

question = {"input": "Where does the Middle Rhine flow between Bingen and Bonn?"}
sources = set()
for part in chain.stream(question):
    sources |= {document.metadata["title"] for document in part.get("context", [])}
    print(part.get("answer", ""), end="", flush=True)
print("\n\nSources:", sorted(sources))
print("Chunks are kept in", llm.engine.stats().directory)
