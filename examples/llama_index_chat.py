"""A chat over documents in LlamaIndex, its history included, with a line on every turn's cache."""

from __future__ import annotations

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from wordllama_embedding import WordLlamaEmbedding

from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform

llm = A3LLM(model="smollm2-135m-instruct", max_new_tokens=48)
embedding = WordLlamaEmbedding()
documents = [
    Document(text="\n\n".join(paragraphs), doc_id=title)
    for title, paragraphs in articles(sample_examples())
]
pipeline = IngestionPipeline(
    transformations=[
        SentenceSplitter(chunk_size=256, chunk_overlap=0),
        embedding,
        A3PrecomputeTransform(llm),
    ]
)
index = VectorStoreIndex(pipeline.run(documents=documents), embed_model=embedding)
chat = index.as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=6)

# The first two retrieve the same passages: the second turn goes on with the first one's cache.
for question in (
    "Where does the Middle Rhine flow between Bingen and Bonn?",
    "Where does the Middle Rhine flow between Bingen and Bonn? Answer in one word.",
    "Who discovered oxygen?",
):
    print(f"\nYou: {question}\nModel: ", end="")
    for piece in chat.stream_chat(question).response_gen:
        print(piece, end="", flush=True)
    report = llm.last_report
    assert report is not None
    print(
        f"\n  [{report.prompt_tokens} tokens: {report.reused_turn_tokens} kept from the turn "
        f"before, {report.cached_tokens - report.reused_turn_tokens} from the store, "
        f"{report.recomputed_tokens} of these recomputed, {report.fresh_tokens} fresh; "
        f"first token after {report.ttft_s:.2f} s]"
    )
