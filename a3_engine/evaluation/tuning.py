"""What suits one model and one corpus: stand-in, KV correction and ratio, by measurement.

Prompts are made of the corpus: chunks in random company, and the beginning of a sentence of one of
them to be gone on with. Settings are compared by their divergence from the model's own full
prefill, chosen on one half of the prompts and reported on the other.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine.chunks.fingerprint import digest
from a3_engine.chunks.stand_in import NONE, SHIPPED
from a3_engine.engine import A3Engine
from a3_engine.evaluation.chunking import Chunker
from a3_engine.evaluation.datasets import Example, Passage
from a3_engine.evaluation.fidelity import Reference, fidelity, full_prefill
from a3_engine.evaluation.haystack import SENTENCE
from a3_engine.evaluation.rows import append_row, read_rows
from a3_engine.fusion.selectors import BALANCED, QUALITIES
from a3_engine.fusion.selectors.base import Selector
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.method import Method
from a3_engine.profile import Profile

CHUNK_TOKENS, PASSAGES = 192, 5  # of a prompt
STAND_IN_PASSAGES, DRAWS = 4, 2  # of the corpus
STRENGTHS = 0.15, 0.3, 0.6
# Less than the method's least number of tokens is no choice in prompts as short as these.
RATIOS = 0.15, 0.25
ENOUGH = 1.2  # times the best ratio's divergence: what a cheaper one may have
ASK = 'How does this sentence of the documents go on? "{begin}"'


class Figure(NamedTuple):
    """One setting's mean answer KL, in nats, on the half that chooses and on the other."""

    stand_in: str
    selector: Selector
    chosen_on: float
    reported_on: float | None = None

    @property
    def strength(self) -> float | None:
        """Of the KV correction; None where nothing is recomputed, and so nothing corrected."""
        correction = self.selector.correction
        return correction.strength if correction is not None and self.selector.ratio else None


@dataclass(frozen=True)
class Tuned:
    """The best profile, what it was chosen from, and the defaults beside it.

    Only the last two were tried on the other half.
    """

    profile: Profile
    figures: list[Figure]
    best: Figure
    default: Figure

    @property
    def better(self) -> bool:
        """Whether the profile is nearer than the defaults on prompts that did not choose it."""
        assert self.best.reported_on is not None
        assert self.default.reported_on is not None
        return self.best.reported_on < self.default.reported_on


def make_examples(chunks: Sequence[str], n: int, seed: int) -> list[Example]:
    """Prompts of chunks in random company, each about a sentence of one of its chunks.

    Raises
    ------
    ValueError
        There are too few chunks, or none has a sentence of eight words.
    """
    if len(chunks) < PASSAGES:
        raise ValueError(
            f"The documents make {len(chunks)} chunks of {CHUNK_TOKENS} tokens, and a prompt takes "
            f"{PASSAGES}. Give more documents."
        )
    draw = random.Random(seed)
    sentences = [(text, words) for text in chunks for words in _sentences(text)]
    if not sentences:
        raise ValueError("The documents hold no sentence of eight words to ask about.")
    examples = []
    for number in range(n):
        gold, words = draw.choice(sentences)
        others = draw.sample([text for text in chunks if text != gold], PASSAGES - 1)
        passages = [Passage("", text) for text in (gold, *others)]
        draw.shuffle(passages)
        middle = len(words) // 2
        examples.append(
            Example(
                id=str(number),
                dataset="documents",
                question=ASK.format(begin=" ".join(words[:middle])),
                answers=(" ".join(words[middle:]),),
                passages=tuple(passages),
            )
        )
    return examples


def _sentences(text: str) -> Iterator[list[str]]:
    for sentence in SENTENCE.split(text):
        if 8 <= len(words := sentence.split()) <= 60:
            yield words


@dataclass
class Tuner:
    """Tries settings of one model on one corpus.

    Parameters
    ----------
    documents : sequence of str
    encode_prefix : str
        What chunks are computed after, before any stand-in.
    prompts : int
        How many are made; half of them choose.
    seed : int
        Of the prompts and of the corpus's own stand-ins.
    record : path or None
        JSON lines; what is found there is not measured again.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[str]
    encode_prefix: str = "template"
    prompts: int = 12
    seed: int = 0
    record: Path | None = None
    progress: bool = True
    _references: dict[str, Reference] = field(default_factory=dict, init=False)
    _done: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise ValueError(f"One prompt chooses and another reports, so not {self.prompts}.")
        for row in read_rows(self.record) if self.record and self.record.exists() else ():
            self._done[str(row.get("key"))] = float(row.get("kl", "nan"))

    def run(self) -> Tuned:
        """Stand-in and strength first, then the ratio; both on the first half of the prompts.

        Raises
        ------
        ValueError
            See :func:`make_examples`; or the model is one that is not fused.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="a3-tune-")))
            chunks = self._chunks(folder)
            stand_ins, rest = self._stand_ins(chunks)
            examples = make_examples(rest, self.prompts, self.seed)
            first, second = examples[: len(examples) // 2], examples[len(examples) // 2 :]
            nothing = Profile(NONE, 0.0, 0.0).selector
            tried = [nothing, *(Profile(NONE, Mend.ratio, s).selector for s in STRENGTHS)]
            default = QUALITIES[BALANCED]
            # Steps of one setting on one prompt; two settings are measured on the second half too.
            total = len(first) * (len(stand_ins) * len(tried) + len(RATIOS) + 1) + 2 * len(second)
            bar = stack.enter_context(tqdm(total=total, desc="tune", disable=not self.progress))
            engines = {
                name: stack.enter_context(closing(self._engine(folder, given)))
                for name, given in stand_ins.items()
            }

            def mean(name: str, selector: Selector, prompts: Sequence[Example]) -> float:
                return fmean(self._kl(engines[name], selector, each, bar) for each in prompts)

            figures = [
                Figure(name, selector, mean(name, selector, first))
                for name in stand_ins
                for selector in tried
            ]
            best = min(
                (figure for figure in figures if figure.selector.ratio), key=lambda f: f.chosen_on
            )
            strength, name = best.strength, best.stand_in
            assert strength is not None
            for ratio in RATIOS:
                selector = Profile(NONE, ratio, strength).selector
                figures.append(Figure(name, selector, mean(name, selector, first)))
            by_ratio = [
                figure
                for figure in figures
                if figure.stand_in == name and figure.strength in (None, strength)
            ]
            least = min(figure.chosen_on for figure in by_ratio)
            enough = (figure for figure in by_ratio if figure.chosen_on <= ENOUGH * least)
            chosen = min(enough, key=lambda figure: figure.selector.ratio)
            before = Figure(
                SHIPPED, default, mean(SHIPPED, default, first), mean(SHIPPED, default, second)
            )
            chosen = chosen._replace(reported_on=mean(name, chosen.selector, second))
            profile = Profile(stand_ins[name], chosen.selector.ratio, chosen.strength or 0.0)
            return Tuned(profile, figures, chosen, before)

    def _chunks(self, folder: Path) -> list[str]:
        with closing(self._engine(folder, NONE)) as engine:
            if engine.unsupported_reason:
                raise ValueError(f"This model is not fused: {engine.unsupported_reason}.")
            chunker = Chunker.of(engine, CHUNK_TOKENS)
            pieces = [piece for text in self.documents for piece in chunker.cut(text)]
        return list(dict.fromkeys(pieces))

    def _stand_ins(self, chunks: list[str]) -> tuple[dict[str, str | tuple[str, ...]], list[str]]:
        """What to try, by name, and the chunks that are left for prompts."""
        stand_ins: dict[str, str | tuple[str, ...]] = {SHIPPED: SHIPPED, NONE: NONE}
        taken = DRAWS * STAND_IN_PASSAGES
        if len(chunks) < taken + 2 * PASSAGES:  # too few to set some aside
            return stand_ins, chunks
        mixed = random.Random(self.seed).sample(chunks, len(chunks))
        for number in range(DRAWS):
            start = number * STAND_IN_PASSAGES
            own = tuple(mixed[start : start + STAND_IN_PASSAGES])
            stand_ins[f"documents {number + 1}"] = own
        return stand_ins, mixed[taken:]

    def _engine(self, folder: Path, stand_in: str | tuple[str, ...]) -> A3Engine:
        return A3Engine(
            (self.model, self.tokenizer),
            name="tuned",
            cache_dir=folder,
            encode_prefix=self.encode_prefix,
            stand_in=stand_in,
        )

    def _kl(self, engine: A3Engine, selector: Selector, example: Example, bar: tqdm) -> float:
        key = digest(engine.fingerprint, repr(selector), repr(example))[:32]
        if key not in self._done:
            engine.precompute([str(passage) for passage in example.passages], progress=False)
            if example.id not in self._references:
                self._references[example.id] = full_prefill(engine, example)
            reference = self._references[example.id]
            self._done[key] = fidelity(engine, reference, Method(selector)).kl_answer
            if self.record:
                append_row(self.record, {"key": key, "kl": self._done[key]})
        bar.update()
        return self._done[key]
