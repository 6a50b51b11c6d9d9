"""What a task is: where its examples come from, and what is measured of a method on one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from a3_engine.engine import A3Engine
from a3_engine.evaluation.chunking import Chunker
from a3_engine.evaluation.datasets import Example, read_examples, sample_examples
from a3_engine.evaluation.prompts import example_prompt
from a3_engine.method import Method

Figures = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where examples come from; a task uses the fields that concern it.

    Parameters
    ----------
    chunker : Chunker
        Cuts long contexts.
    data : tuple of Path
        Files of examples; the shipped sample where there are none.
    text : Path or None
        What generated contexts are made of; the shipped sample's articles where None.
    lengths : tuple of int
        Tokens of generated contexts; the task's own where empty.
    samples : int
        Generated examples of each kind and length.
    seed : int
        Of the generators.
    """

    chunker: Chunker
    data: tuple[Path, ...] = ()
    text: Path | None = None
    lengths: tuple[int, ...] = ()
    samples: int = 1
    seed: int = 0


class Task(ABC):
    """Base of all tasks."""

    name: ClassVar[str]
    about: ClassVar[str]

    def datasets(self, source: Source) -> list[list[Example]]:
        """The examples of each file, or of each kind that the task generates."""
        if not source.data:
            return [sample_examples()]
        return [read_examples(path, chunker=source.chunker) for path in source.data]

    @abstractmethod
    def measure(
        self, engine: A3Engine, example: Example, methods: Sequence[Method]
    ) -> Iterator[Figures]:
        """Each method's figures, in order; floats are averaged over the examples.

        ``*_s`` are seconds. The chunks are stored already.
        """


class AnswerTask(Task):
    """A task that scores what the model answers, greedily."""

    answer_tokens: ClassVar[int]
    stop: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Scores of an answer, 0 to 1."""

    def measure(
        self, engine: A3Engine, example: Example, methods: Sequence[Method]
    ) -> Iterator[Figures]:
        prompt = example_prompt(engine, example)
        for method in methods:
            answer = engine.generate(
                prompt,
                selector=method.selector,
                compression=method.compression,
                max_new_tokens=example.answer_tokens or self.answer_tokens,
                stop=self.stop,
            )
            yield {
                **self.score(example, answer.text),
                "ttft_s": answer.report.ttft_s,
                "answer": answer.text,
            }
