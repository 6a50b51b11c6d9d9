"""Short answers to questions, by exact match and token F1 as LongBench computes it."""

from __future__ import annotations

from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.metrics import exact_match, f1
from a3_engine.evaluation.tasks.base import AnswerTask


class QA(AnswerTask):
    """The first line of the answer against the accepted ones."""

    name = "qa"
    about = "exact match and F1 of short answers"
    answer_tokens = 32
    stop = ("\n",)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"em": exact_match(answer, example.answers), "f1": f1(answer, example.answers)}
