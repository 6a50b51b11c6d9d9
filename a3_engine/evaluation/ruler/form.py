"""What RULER's generators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class Sample(NamedTuple):
    """One generated test.

    ``context`` is everything before the last line, ``question`` that line, ``begin`` the start of
    the answer, ``answers`` all that the answer must hold.
    """

    context: str
    question: str
    begin: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What samples are made of.

    Parameters
    ----------
    essay : tuple of str
        Words of a text, punctuation and all.
    nouns, adjectives, verbs : tuple of str
        English words.
    count : callable
        Tokens of a text.
    length : int
        Tokens of the prompt with its answer.
    """

    essay: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    count: Callable[[str], int]
    length: int


# A sample with a haystack of a size: sentences, words or lines, as the kind has it.
Build = Callable[[int, Random, Material], Sample]


@dataclass(frozen=True)
class Kind:
    """One of RULER's tests; ``least`` and ``most`` bound the size of its haystack."""

    build: Build
    answer_tokens: int
    least: int = 1
    most: int = 2**20


def english() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Nouns, adjectives and verbs, from the list that RULER uses.

    Raises
    ------
    ImportError
        wonderwords is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError(
            "wonderwords is not installed. Run: pip install 'a3-integrations[eval]'"
        ) from error
    words = RandomWord()
    nouns, adjectives, verbs = (
        tuple(words.filter(include_categories=[kind])) for kind in ("noun", "adjective", "verb")
    )
    return nouns, adjectives, verbs


def generate(kind: Kind, material: Material, seed: str) -> Sample:
    """The sample of a seed with the largest haystack that fits.

    Raises
    ------
    ValueError
        Not even the smallest fits.
    """

    def build(size: int) -> Sample:
        return kind.build(size, Random(seed), material)

    def fits(size: int) -> bool:
        sample = build(size)
        text = f"{sample.context}\n{sample.question}{sample.begin}"
        return material.count(text) + kind.answer_tokens <= material.length

    if not fits(kind.least):
        raise ValueError(f"{material.length} tokens are too few for this test of RULER.")
    low, high = kind.least, 2 * kind.least
    while high <= kind.most and fits(high):
        low, high = high, 2 * high
    high = min(high, kind.most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)
