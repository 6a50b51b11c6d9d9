"""RULER's aggregation: the most common of listed words, the most frequent of coded words."""

from __future__ import annotations

import math
import string
from random import Random

from a3_engine.evaluation.ruler.form import Kind, Material, Sample

COMMON = 10
MOST_WORDS = 8000  # of the list's 8,600
LONG = 4096  # tokens from which RULER repeats its words more often
CODED_LETTERS = 6


def common_words(size: int, rng: Random, material: Material) -> Sample:
    """A solved list of words, then one of ``size`` different words, ten of them common."""
    words = sorted({*material.nouns, *material.adjectives, *material.verbs})
    if material.length < LONG:
        solved, asked = _list(words, 20, 3, 1, rng), _list(words, size, 6, 1, rng)
    else:
        solved, asked = _list(words, 40, 10, 3, rng), _list(words, size, 30, 3, rng)
    shown = " ".join(f"{place}. {word}" for place, word in enumerate(solved.answers, start=1))
    return asked._replace(
        context=f"{solved.context}\n{solved.question}{solved.begin} {shown}\n{asked.context}"
    )


def frequent_words(size: int, rng: Random, material: Material) -> Sample:
    """About ``size`` coded words whose counts fall with the square of their rank (Zipf)."""
    vocabulary: list[str] = ["..."]  # the most frequent is noise
    while len(vocabulary) < max(material.length // 50, 5):
        word = "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))
        vocabulary += [word] * (word not in vocabulary)
    zeta = math.pi**2 / 6
    text = [
        word
        for rank, word in enumerate(vocabulary, start=1)
        for _ in range(int(size / rank**2 / zeta))
    ]
    rng.shuffle(text)
    return Sample(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(text)}",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(vocabulary[1:4]),
    )


def _list(words: list[str], size: int, often: int, seldom: int, rng: Random) -> Sample:
    chosen = rng.sample(words, size)
    common = chosen[:COMMON]
    listed = common * often + chosen[COMMON:] * seldom
    rng.shuffle(listed)
    numbered = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
    return Sample(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{numbered}",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        tuple(common),
    )


KINDS = {
    "cwe": Kind(common_words, answer_tokens=120, least=COMMON + 1, most=MOST_WORDS),
    # From here on the third word is more frequent than the fourth.
    "fwe": Kind(frequent_words, answer_tokens=50, least=40),
}
