"""Long texts to hide things in: any file's, or the articles of the shipped sample."""

from __future__ import annotations

import re
from pathlib import Path

from a3_engine.evaluation.datasets import articles, sample_examples

SENTENCE = re.compile(r"(?<=[.!?])\s+")


def haystack_sentences(path: Path | None) -> list[str]:
    """Sentences of a text file, white space made plain; the sample's articles where None.

    Raises
    ------
    ValueError
        The file has no text.
    """
    if path is None:
        text = "\n".join("\n".join(texts) for _, texts in articles(sample_examples()))
    else:
        text = path.read_text(encoding="utf-8")
    sentences = [" ".join(sentence.split()) for sentence in SENTENCE.split(text.strip())]
    if not any(sentences):
        raise ValueError(f"{path} has no text to hide anything in.")
    return sentences
