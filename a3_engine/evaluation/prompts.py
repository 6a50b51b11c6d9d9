"""The prompt of an example: the same token ids for every method."""

from __future__ import annotations

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.prompt import Chunk, Message
from a3_engine.segments import Prompt

QUESTION = "Answer the question in a few words, from the documents above.\nQuestion: {question}"
SUMMARY = "Write a one-page summary of the documents above."


def example_prompt(engine: A3Engine, example: Example) -> Prompt:
    """The passages as chunks between the example's words, and the answer begun."""
    content: list[str | Chunk] = [f"{example.head}\n\n"] if example.head else []
    for passage in example.passages:
        content += [Chunk(str(passage)), "\n\n"]
    asked = QUESTION.format(question=example.question) if example.question else SUMMARY
    messages = [Message("user", [*content, example.ask or asked])]
    if example.begin:
        messages.append(Message("assistant", example.begin))
    # The chunks are given; looking for others would let earlier examples change this one.
    return engine.runtime.planner.plan(messages, match=False)
