"""RULER's retrieval: needles of keys and values, single, multi-key, multi-value, multi-query."""

from __future__ import annotations

import uuid
from functools import partial
from random import Random
from typing import Any, Literal

from a3_engine.evaluation.haystack import SENTENCE
from a3_engine.evaluation.ruler.form import Kind, Material, Sample

Hay = Literal["noise", "essay", "needle"]
Type = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
DEPTHS = [round(100 * step / 39) for step in range(40)]  # per cent


def build(
    size: int,
    rng: Random,
    material: Material,
    *,
    hay: Hay,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    key_type: Type = "words",
    value_type: Type = "numbers",
) -> Sample:
    """A sample whose haystack has ``size`` words (essay) or lines (noise, needle)."""
    keys = max(keys, queries)

    def draw(kind: Type) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return f"{rng.choice(material.adjectives)}-{rng.choice(material.nouns)}"

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type=value_type, key=key, value=value)

    hidden = {draw(key_type): [draw(value_type) for _ in range(values)] for _ in range(keys)}
    needles = [needle(key, value) for key, held in hidden.items() for value in held]
    rng.shuffle(needles)
    asked = rng.sample(sorted(hidden), queries)
    if hay == "essay":
        context = _among_sentences(needles, size, rng, material)
    else:
        lines = [
            NOISE if hay == "noise" else needle(draw(key_type), draw(value_type))
            for _ in range(size)
        ]
        for at in sorted(rng.sample(range(size), len(needles)), reverse=True):
            lines.insert(at, needles.pop())
        context = "\n".join(lines)
    query = ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]
    return _worded(context, query, value_type, queries * values == 1)._replace(
        answers=tuple(value for key in asked for value in hidden[key])
    )


def _among_sentences(needles: list[str], size: int, rng: Random, material: Material) -> str:
    essay = material.essay
    words = (essay[index % len(essay)] for index in range(size))
    sentences = SENTENCE.split(" ".join(words))
    depths = sorted(rng.sample(DEPTHS, len(needles)), reverse=True)
    for depth, needle in zip(depths, needles, strict=True):
        sentences.insert(int(len(sentences) * depth / 100), needle)
    return " ".join(sentences)


def _worded(context: str, query: str, kind: str, single: bool) -> Sample:
    a, are, what = ("A", "is", kind[:-1]) if single else ("Some", "are", kind)
    whole = "is" if single else "are all"
    return Sample(
        f"{a} special magic {what} {are} hidden within the following text. Make sure to memorize "
        f"it. I will quiz you about the {what} afterwards.\n{context}",
        f"What {whole} the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
        (),
    )


def _kind(hay: Hay, **settings: Any) -> Kind:
    return Kind(partial(build, hay=hay, **settings), answer_tokens=128)


KINDS = {
    "niah_single_1": _kind("noise"),
    "niah_single_2": _kind("essay"),
    "niah_single_3": _kind("essay", value_type="uuids"),
    "niah_multikey_1": _kind("essay", keys=4),
    "niah_multikey_2": _kind("needle"),
    "niah_multikey_3": _kind("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": _kind("essay", values=4),
    "niah_multiquery": _kind("essay", queries=4),
}
