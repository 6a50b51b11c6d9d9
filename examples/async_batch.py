"""Many questions over the same documents at once, asked by an event loop."""

import asyncio
import time

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from a3_engine.evaluation.datasets import articles, sample_examples
from a3_integrations.langchain import ChatA3, create_a3_documents_chain

QUESTIONS = [
    "What is the Rhine?",
    "Which sea does the Rhine flow into?",
    "Where does the Middle Rhine flow?",
]


async def main() -> None:
    llm = ChatA3(model="smollm2-135m-instruct", max_tokens=24)
    texts = dict(articles(sample_examples()))["Rhine"]
    documents = [Document(page_content=text, metadata={"source": "Rhine"}) for text in texts]
    await llm.aprecompute(documents)

    prompt = ChatPromptTemplate.from_template("{context}\n\nAnswer in one sentence: {question}")
    chain = create_a3_documents_chain(llm, prompt)
    inputs = [{"context": documents, "question": question} for question in QUESTIONS]
    started = time.perf_counter()
    # The engine computes one answer after the other; each comes as soon as it is there.
    async for number, answer in chain.abatch_as_completed(inputs):
        print(f"{time.perf_counter() - started:5.1f} s  {QUESTIONS[number]}  {answer.strip()}")


asyncio.run(main())
