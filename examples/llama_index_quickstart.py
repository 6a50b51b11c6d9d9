"""A LlamaIndex query engine that answers from cached chunks. The second run starts warm."""

from pathlib import Path

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from wordllama_embedding import WordLlamaEmbedding

from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform, A3Synthesizer

# Your own: A3LLM(model="Qwen/Qwen2.5-1.5B-Instruct"), a local folder, or a .gguf file.
llm = A3LLM(model="smollm2-135m-instruct", max_new_tokens=48)
embedding = WordLlamaEmbedding()

documents = [
    Document(text="\n\n".join(paragraphs), doc_id=title, metadata={"title": title})
    for title, paragraphs in articles(sample_examples())
]
pipeline = IngestionPipeline(
    transformations=[
        SentenceSplitter(chunk_size=256, chunk_overlap=0),
        embedding,
        A3PrecomputeTransform(llm),  # computes each node's KV once; it stays on disk
    ]
)
index = VectorStoreIndex(pipeline.run(documents=documents), embed_model=embedding)
query_engine = index.as_query_engine(
    llm=llm,
    similarity_top_k=12,
    response_synthesizer=A3Synthesizer(llm, streaming=True),
)

response = query_engine.query("Where does the Middle Rhine flow between Bingen and Bonn?")
response.print_response_stream()
print("\n\nSources:", sorted({node.metadata["title"] for node in response.source_nodes}))
print(llm.last_report)
print("Chunks are kept in", Path(llm.engine.stats().directory))
