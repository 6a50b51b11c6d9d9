"""Prompts with an exact number of retrieved tokens, from the shipped sample's real text."""

from __future__ import annotations

from bisect import bisect_left

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_engine.prompt import PromptPlanner
from a3_engine.segments import Prompt

QUESTION = "Answer in one sentence: which of these places is the largest city by population?"
GRAIN = 256  # a context that does not fit is cut to a multiple of this
LONGEST_TOKEN = 12  # characters; the mean over some hundred tokens stays far below
NEARBY = 16  # characters around the likeliest border in which the exact one is looked for


def build_prompt(engine: A3Engine, context_tokens: int, chunk_tokens: int) -> Prompt:
    """A question after ``context_tokens`` of text in chunks of exactly ``chunk_tokens``.

    The prompt also has the chat template, the blank lines between the chunks, and the question.
    """
    return engine.plan(QUESTION, chunk_texts(engine.runtime.planner, context_tokens, chunk_tokens))


def chunk_texts(planner: PromptPlanner, context_tokens: int, chunk_tokens: int) -> list[str]:
    """Pieces of the sample in order; where it ends it begins again, in other pieces.

    All have ``chunk_tokens`` but the last, which has what is left of ``context_tokens``.
    """
    paragraphs = [text for _, texts in articles(sample_examples()) for text in texts]
    text = "\n\n".join(paragraphs) + "\n\n"
    chunks: list[str] = []
    at = 0
    for start in range(0, context_tokens, chunk_tokens):
        wanted = min(chunk_tokens, context_tokens - start)
        room = LONGEST_TOKEN * wanted + NEARBY
        ahead = (text[at:] + text * (room // len(text) + 1))[:room]
        begin, stop = _cut(planner, ahead, wanted)
        chunks.append(ahead[begin:stop].strip())
        at = (at + stop) % len(text)
    return chunks


def fitting(engine: A3Engine, context_tokens: int, chunk_tokens: int, answer_tokens: int) -> int:
    """``context_tokens``, or the largest multiple of 256 below that fits into the model's window.

    Raises
    ------
    ValueError
        The window has no room for any context beside the question and the answer.
    """
    planner = engine.runtime.planner
    n_chunks = -(-context_tokens // chunk_tokens)
    around = engine.plan(QUESTION).n_tokens + n_chunks * len(planner.tokenize_text("\n\n"))
    room = engine.context_window - around - answer_tokens
    if room < min(context_tokens, GRAIN):
        raise ValueError(
            f"The model's window of {engine.context_window} tokens has no room for a context "
            f"beside {around} tokens of question and {answer_tokens} of the answer."
        )
    return context_tokens if context_tokens <= room else room // GRAIN * GRAIN


def _cut(planner: PromptPlanner, text: str, n_tokens: int) -> tuple[int, int]:
    """Start and end of the first piece that has exactly ``n_tokens``.

    No end may do for a start, where one more character makes two more tokens.
    """
    for start in range(NEARBY):

        def count(stop: int, start: int = start) -> int:
            return len(planner.chunk_ids(text[start:stop]))

        likely = bisect_left(range(len(text)), n_tokens, key=count)
        for stop in range(likely - NEARBY // 2, likely + NEARBY // 2):
            if count(stop) == n_tokens:
                return start, stop
    raise ValueError(f"The sample cannot be cut into chunks of {n_tokens} of the model's tokens.")
