"""Questions with their passages, read from JSON lines of three forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from a3_engine.evaluation.chunking import Chunker

FORMS = """Each line is one of
  {"question", "answers", "ctxs": [{"title", "text"}]}: a question with retrieved passages
  {"input", "context", "answers"}: LongBench, whose context is cut into chunks
  {"prompt", "answers"}: LongBench's finished prompts, whose context is cut likewise"""
# Opening words with a line that announces the context; context; closing words with the question.
LONGBENCH_PROMPT = re.compile(
    r"(?P<head>[^\n]+\n\n[^\n]+\n)(?P<context>.+)\n\n"
    r"(?P<ask>[^\n]+\n\n(?:Question|Query|Summary):(?P<question>[^\n]*).*)",
    re.DOTALL,
)
# Of the window, beside a long context: the chat template, and an answer as long as LongBench's.
TEMPLATE_TOKENS, ANSWER_TOKENS = 64, 512


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
    """A question, its accepted answers and its passages in the order of the prompt.

    Parameters
    ----------
    head, ask : str
        The words before and after the passages. Where ``ask`` is empty, a task uses its own, with
        the question.
    begin : str
        How the answer begins; the model goes on from there.
    facts : tuple of str
        What a right answer holds, for tasks that score recall.
    answer_tokens : int
        Room for the answer; the task's own where 0.
    labels : mapping
        What else tells its rows apart, such as depth and length.
    """

    id: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    head: str = ""
    ask: str = ""
    begin: str = ""
    facts: tuple[str, ...] = ()
    answer_tokens: int = 0
    labels: Mapping[str, int | str] = field(default_factory=dict)


def read_examples(
    path: str | Path, limit: int | None = None, chunker: Chunker | None = None
) -> list[Example]:
    """Read JSON lines; the form of each is known by its fields.

    Retrieved passages (``{id, dataset, question, answers, ctxs: [{title, text, gold}]}``) are
    chunks as they are. LongBench's own form (``{input, context, answers, dataset, _id, ...}``,
    arXiv 2308.14508) and its finished prompts (``{id, dataset, prompt, answers}``) have one long
    context.

    Parameters
    ----------
    limit : int or None
        Rows at most.
    chunker : Chunker or None
        Cuts long contexts, after taking out the middle of those that the window would not hold;
        None keeps each whole.

    Raises
    ------
    ValueError
        A line is of no known form; the message names it.
    """
    source = Path(path)
    examples: list[Example] = []
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(examples) == limit:
                break
            if line.strip():
                try:
                    examples.append(_example(json.loads(line), source.stem, number, chunker))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{source}, line {number}: no example can be read ({error!r}). {FORMS}"
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


def passages_of(text: str, chunker: Chunker | None) -> tuple[Passage, ...]:
    """A long text as passages without titles."""
    return tuple(Passage("", chunk) for chunk in (chunker.cut(text) if chunker else [text]))


def _example(row: dict[str, Any], stem: str, number: int, chunker: Chunker | None) -> Example:
    common: dict[str, Any] = {
        "id": str(row.get("id") or row.get("_id") or number),
        "dataset": str(row.get("dataset", stem)),
        "answers": tuple(row["answers"]),
    }
    if "prompt" in row:
        found = LONGBENCH_PROMPT.fullmatch(row["prompt"])
        if found is None:
            raise ValueError("the prompt does not end in a question after a context")
        context, question = found["context"], found["question"].strip()
        head, ask = found["head"].strip(), found["ask"].strip()
    elif "context" in row:
        context, question, head, ask = row["context"], row["input"], "", ""
    else:
        ctxs = row["ctxs"]
        retrieved = [Passage(c.get("title") or "", c["text"], bool(c.get("gold"))) for c in ctxs]
        return Example(question=row["question"], passages=tuple(retrieved), **common)
    if chunker:
        around = TEMPLATE_TOKENS + chunker.count(head + ask + question)
        context = chunker.fit(context, around + min(ANSWER_TOKENS, chunker.window // 4))
    passages = passages_of(context, chunker)
    return Example(question=question, passages=passages, head=head, ask=ask, **common)
