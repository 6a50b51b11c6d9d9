"""Questions with their retrieved passages, read from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Passage:
    """A retrieved passage; ``gold`` marks those that support the answer."""

    title: str
    text: str
    gold: bool = False

    def __str__(self) -> str:
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Example:
    """A question, its accepted answers and its passages in order of retrieval."""

    id: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """Read ``{id, dataset, question, answers, ctxs: [{title, text, gold}]}`` lines.

    Raises
    ------
    ValueError
        A line is not of this form; the message names it.
    """
    source = Path(path)
    examples: list[Example] = []
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(examples) == limit:
                break
            if line.strip():
                try:
                    examples.append(_example(json.loads(line), source.stem, number))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{source}, line {number}: not a question with passages ({error!r}). "
                        'Each line is {"question", "answers", "ctxs": [{"title", "text"}]}.'
                    ) from error
    return examples


def sample_examples() -> list[Example]:
    """The sample that ships with the package; see ``data/README.md`` for source and licence."""
    return read_examples(Path(str(files("a3_engine.evaluation") / "data" / "sample.jsonl")))


def articles(examples: list[Example]) -> Iterator[tuple[str, list[str]]]:
    """Title and paragraphs of every article in the examples, each once."""
    paragraphs: dict[str, dict[str, None]] = {}
    for example in examples:
        for passage in example.passages:
            paragraphs.setdefault(passage.title, {})[passage.text] = None
    for title, texts in paragraphs.items():
        yield title, list(texts)


def _example(row: dict, stem: str, number: int) -> Example:
    return Example(
        id=str(row.get("id") or number),
        dataset=str(row.get("dataset", stem)),
        question=row["question"],
        answers=tuple(row["answers"]),
        passages=tuple(
            Passage(ctx.get("title") or "", ctx["text"], bool(ctx.get("gold")))
            for ctx in row["ctxs"]
        ),
    )
