"""A needle in a haystack: a sentence hidden at a depth of a long text, asked for after it.

After Kamradt's test (github.com/gkamradt/LLMTest_NeedleInAHaystack), whose needle is the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

from a3_engine.engine import A3Engine
from a3_engine.evaluation.chunking import Chunker
from a3_engine.evaluation.datasets import Example, passages_of
from a3_engine.evaluation.fidelity import answer_nll
from a3_engine.evaluation.haystack import haystack_sentences
from a3_engine.evaluation.metrics import recall
from a3_engine.evaluation.prompts import example_prompt
from a3_engine.evaluation.tasks.base import AnswerTask, Figures, Source
from a3_engine.method import Method

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the context


class Hidden(NamedTuple):
    """A needle, its question, the answer in the needle's words, and the facts to recall."""

    sentence: str
    question: str
    answer: str
    facts: tuple[str, ...]

    @property
    def lead(self) -> str:
        """The needle's words before the answer."""
        return self.sentence.partition(self.answer)[0].strip()


NEEDLES = (
    Hidden(
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day.",
        "What is the best thing to do in San Francisco?",
        "eat a sandwich and sit in Dolores Park on a sunny day",
        ("sandwich", "Dolores Park", "sunny day"),
    ),
    Hidden(
        "The spare key to the observatory is kept in a blue teapot behind the harbour office.",
        "Where is the spare key to the observatory kept?",
        "in a blue teapot behind the harbour office",
        ("blue teapot", "harbour office"),
    ),
    Hidden(
        "The night ferry to Karlsborg leaves from pier 17 at a quarter past eleven.",
        "From which pier and when does the night ferry to Karlsborg leave?",
        "from pier 17 at a quarter past eleven",
        ("pier 17", "quarter past eleven"),
    ),
    Hidden(
        "Professor Ottilie Brandt won the gliding cup with a plane built from walnut and silk.",
        "What was the plane built from with which Professor Ottilie Brandt won the gliding cup?",
        "walnut and silk",
        ("walnut", "silk"),
    ),
)


class Needle(AnswerTask):
    """Depth by length; recall of the facts, and the likelihood of the answer.

    Recall of a small model is coarse; ``gold_nll``, the mean negative log-likelihood of the answer
    in the needle's words after the needle's beginning (nats a token), moves with every method.
    """

    name = "needle"
    about = "a sentence hidden in a long text: recall by depth and length, and likelihood"
    answer_tokens = 32
    stop = ("\n",)

    def datasets(self, source: Source) -> list[list[Example]]:
        """One a length; a sample is every depth with one needle in one stretch of the text."""
        sentences = haystack_sentences(source.text)
        return [
            [
                _example(source, sentences, length, depth, sample)
                for sample in range(source.samples)
                for depth in DEPTHS
            ]
            for length in source.lengths or LENGTHS
        ]

    def measure(
        self, engine: A3Engine, example: Example, methods: Sequence[Method]
    ) -> Iterator[Figures]:
        lead = {needle.question: needle.lead for needle in NEEDLES}[example.question]
        prompt = example_prompt(engine, replace(example, begin=lead))
        figures = super().measure(engine, example, methods)
        for method, each in zip(methods, figures, strict=True):
            nll = answer_nll(engine, prompt, f" {example.answers[0]}", method)
            yield {"gold_nll": nll, **each}

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"recall": recall(answer, example.facts)}


def hide(
    needle: str, sentences: Sequence[str], length: int, depth: int, chunker: Chunker
) -> list[str]:
    """Sentences of ``length`` tokens or a few less, the needle at the border nearest to ``depth``.

    Parameters
    ----------
    sentences : sequence of str
        The haystack; it begins again at its end.
    depth : int
        Per cent of the haystack's tokens that stand before the needle.

    Raises
    ------
    ValueError
        The needle alone is longer.
    """
    room = length - chunker.count(needle)
    if room < 0:
        raise ValueError(f"A context of {length} tokens is too short for the needle.")
    hay: list[str] = []
    borders = [0]
    for sentence in cycle(sentences):
        borders.append(borders[-1] + chunker.count(f" {sentence}"))
        if borders[-1] > room:
            break
        hay.append(sentence)
    deep = borders[len(hay)] * depth / 100
    at = min(range(len(hay) + 1), key=lambda border: abs(borders[border] - deep))
    return [*hay[:at], needle, *hay[at:]]


def _example(source: Source, sentences: list[str], length: int, depth: int, sample: int) -> Example:
    needle = NEEDLES[sample % len(NEEDLES)]
    start = random.Random(f"{source.seed} {sample}").randrange(len(sentences))
    stretch = sentences[start:] + sentences[:start]
    context = " ".join(hide(needle.sentence, stretch, length, depth, source.chunker))
    return Example(
        id=f"{source.seed}-{sample}-{depth}",
        dataset=f"needle_{length}",
        question=needle.question,
        answers=(needle.answer,),
        passages=passages_of(context, source.chunker),
        facts=needle.facts,
        labels={"length": length, "depth": depth},
    )
