"""RULER: retrieval, tracking and aggregation in generated texts, by recall of all answers."""

from __future__ import annotations

from a3_engine.evaluation.datasets import Example, passages_of
from a3_engine.evaluation.haystack import haystack_sentences
from a3_engine.evaluation.metrics import recall
from a3_engine.evaluation.ruler import needles, variables, words
from a3_engine.evaluation.ruler.form import Kind, Material, english, generate
from a3_engine.evaluation.tasks.base import AnswerTask, Source

KINDS: dict[str, Kind] = {**needles.KINDS, **variables.KINDS, **words.KINDS}
LENGTHS = (4096,)


class Ruler(AnswerTask):
    """RULER's eleven tests without its two of question answering, for which there is `qa`.

    All before the question is cut into chunks. The answer begins with RULER's words for it.
    """

    name = "ruler"
    about = "RULER: needles, variable tracking, common and frequent words"
    answer_tokens = max(kind.answer_tokens for kind in KINDS.values())

    def datasets(self, source: Source) -> list[list[Example]]:
        """One a test and length."""
        essay = tuple(" ".join(haystack_sentences(source.text)).split())
        vocabulary = english()
        return [
            [
                _example(
                    source, Material(essay, *vocabulary, source.chunker.count, length), name, i
                )
                for i in range(source.samples)
            ]
            for length in source.lengths or LENGTHS
            for name in KINDS
        ]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"recall": recall(answer, example.facts)}


def _example(source: Source, material: Material, name: str, index: int) -> Example:
    sample = generate(KINDS[name], material, f"{source.seed} {name} {index}")
    return Example(
        id=f"{source.seed}-{index}",
        dataset=f"{name}_{material.length}",
        question=sample.question,
        answers=(" ".join(sample.answers),),
        passages=passages_of(sample.context, source.chunker),
        ask=sample.question,
        begin=sample.begin.strip(),
        facts=sample.answers,
        answer_tokens=KINDS[name].answer_tokens,
        labels={"length": material.length},
    )
