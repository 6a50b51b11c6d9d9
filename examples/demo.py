"""The demo after `make demo`: each question answered twice, by full prefill and through A³.

Real documents, a real model, a stock LlamaIndex index. The first run computes the KV of every
node and keeps it; later runs find it on disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llama_index.core import Document, PromptTemplate, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from wordllama_embedding import WordLlamaEmbedding

from a3_engine import A3Engine, FusionReport
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.llama_index import A3LLM, A3PrecomputeTransform, A3Synthesizer

QUESTIONS = [
    "How many species of trees can be found in the Amazon rainforest?",
    "In which county does Jacksonville reside?",
    "What is the name of the first Doctor Who serial?",
    "Who kidnapped Temüjin's first wife soon after they were married?",
    "Where does the Middle Rhine flow between Bingen and Bonn?",
    "When was the colony of New South Wales founded?",
]
THROUGH = "through A³"
TEMPLATE = PromptTemplate(
    "{context_str}\n\nAnswer the question in one short sentence, from the text above.\n"
    "Question: {query_str}"
)


@dataclass
class Asked:
    """One question's answers and reports, by full prefill and through A³."""

    question: str
    answers: dict[str, str]
    reports: dict[str, FusionReport]
    sources: list[str]


def build_index(llm: A3LLM) -> VectorStoreIndex:
    embedding = WordLlamaEmbedding()
    documents = [
        Document(text="\n\n".join(paragraphs), doc_id=title, metadata={"title": title})
        for title, paragraphs in articles(sample_examples())
    ]
    before = llm.engine.stats()
    started = time.perf_counter()
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=256, chunk_overlap=0),
            embedding,
            A3PrecomputeTransform(llm),
        ]
    )
    nodes = pipeline.run(documents=documents)
    after = llm.engine.stats()
    seconds = time.perf_counter() - started
    if after.entries == before.entries:
        print(f"Warm start: the KV of all {len(nodes)} nodes was on disk ({seconds:.1f} s).")
    else:
        print(
            f"Ingested {len(documents)} documents as {len(nodes)} nodes in {seconds:.1f} s; "
            "their KV stays on disk for the next run."
        )
    print(
        f"Store: {after.directory}, {after.nbytes / 2**20:.0f} MiB in {after.entries} entries, "
        f"limit {after.size_limit / 2**30:.0f} GiB.\n"
    )
    return VectorStoreIndex(nodes, embed_model=embedding)


def ask(index: VectorStoreIndex, llms: dict[str, A3LLM], question: str) -> Asked:
    asked = Asked(question, {}, {}, [])
    for name, llm in llms.items():
        synthesizer = A3Synthesizer(llm, streaming=True, text_qa_template=TEMPLATE)
        engine = index.as_query_engine(
            llm=llm, similarity_top_k=12, response_synthesizer=synthesizer
        )
        response = engine.query(question)
        asked.answers[name] = "".join(response.response_gen).strip()
        assert llm.last_report is not None
        asked.reports[name] = llm.last_report
        asked.sources = sorted({node.metadata["title"] for node in response.source_nodes})
    return asked


def show(asked: Asked) -> None:
    print(asked.question)
    for name, answer in asked.answers.items():
        report = asked.reports[name]
        tokens = f"{report.prompt_tokens} tokens computed"
        if report.fused:
            tokens = (
                f"{report.cached_tokens} tokens cached, {report.recomputed_tokens} of them "
                f"recomputed, {report.fresh_tokens} fresh"
            )
        print(f"  {name:<13} first token {report.ttft_s:6.2f} s   {tokens}")
        print(f"  {'':<13} {answer!r}")
    print(f"  sources: {', '.join(asked.sources)}\n")


def draw(results: list[Asked], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.7 * len(results) + 1.2))
    for offset, (name, colour) in enumerate((("full prefill", "#b0b7c3"), (THROUGH, "#2563eb"))):
        seconds = [asked.reports[name].ttft_s for asked in results]
        places = [row + 0.38 * offset for row in range(len(results))]
        bars = axes.barh(places, seconds, height=0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f s", padding=3, fontsize=8)
    axes.set_yticks(
        [row + 0.19 for row in range(len(results))],
        [asked.question for asked in results],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlabel("time to first token, seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=None, help="recompute ratio, 0 to 1")
    parser.add_argument("--selector", default=None, help="fusion method")
    parser.add_argument("--output", type=Path, default=Path("demo-output/ttft.png"))
    options = parser.parse_args()

    started = time.perf_counter()
    engine = A3Engine.from_pretrained("smollm2-135m-instruct")
    window = engine.context_window  # loads the model
    if engine.unsupported_reason:
        sys.exit(f"Nothing can be fused here: {engine.unsupported_reason}.")
    settings = {"engine": engine, "max_new_tokens": 40}
    llms = {
        "full prefill": A3LLM(**settings, selector="full_prefill"),
        THROUGH: A3LLM(**settings, selector=options.selector, ratio=options.ratio),
    }
    seconds = time.perf_counter() - started
    print(f"Model ready in {seconds:.1f} s, context window {window} tokens.", flush=True)
    index = build_index(llms[THROUGH])
    ask(index, llms, QUESTIONS[0])  # the first request pays for warming up, both ways

    results = []
    for question in QUESTIONS:
        results.append(ask(index, llms, question))
        show(results[-1])
    medians = {
        name: statistics.median(asked.reports[name].ttft_s for asked in results) for name in llms
    }
    ratio = medians["full prefill"] / medians[THROUGH]
    same = sum(asked.answers[THROUGH] == asked.answers["full prefill"] for asked in results)
    print(
        f"Median time to first token: {medians['full prefill']:.2f} s by full prefill, "
        f"{medians[THROUGH]:.2f} s through A³: {ratio:.1f} times sooner."
    )
    print(f"Answers that agree to the letter: {same} of {len(results)}.")
    draw(results, options.output)
    print(f"Chart: {options.output}")


if __name__ == "__main__":
    main()
