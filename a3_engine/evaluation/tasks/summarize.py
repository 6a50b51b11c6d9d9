"""Summaries of the passages, by ROUGE-L."""

from __future__ import annotations

from dataclasses import replace

from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.metrics import rouge_l
from a3_engine.evaluation.prompts import SUMMARY
from a3_engine.evaluation.tasks.base import AnswerTask, Source


class Summarize(AnswerTask):
    """The whole answer against the accepted summaries."""

    name = "summarize"
    about = "ROUGE-L of summaries (LongBench's gov_report, multi_news and qmsum)"
    answer_tokens = 512  # as LongBench allows

    def datasets(self, source: Source) -> list[list[Example]]:
        if not source.data:
            raise ValueError(
                "The shipped sample has no summaries. Give --data a file of LongBench's form "
                "whose answers are summaries, such as multi_news."
            )
        return [[_asked(example) for example in each] for each in super().datasets(source)]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"rouge_l": rouge_l(answer, example.answers)}


def _asked(example: Example) -> Example:
    """A question beside the context (qmsum) is the summary's subject."""
    query = f"\nQuery: {example.question}" if example.question else ""
    return replace(example, ask=example.ask or SUMMARY + query)
