"""Scores of answers, and intervals of their means."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
RESAMPLES = 2000


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD and LongBench do)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is one of the answers after normalization."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token F1 against the accepted answers, 0 to 1 (LongBench, ``qa_f1_score``)."""
    return max((_token_f1(prediction, answer) for answer in answers), default=0.0)


def recall(prediction: str, facts: Sequence[str]) -> float:
    """Share of the facts that stand in the prediction, whatever the case (RULER)."""
    text = prediction.lower()
    return sum(fact.lower() in text for fact in facts) / len(facts)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Best ROUGE-L F-measure against the accepted summaries, 0 to 1; words are not stemmed.

    Raises
    ------
    ImportError
        rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "rouge-score is not installed. Run: pip install 'a3-integrations[eval]'"
        ) from error
    scorer = RougeScorer(["rougeL"])
    return float(scorer.score_multi(list(answers), prediction)["rougeL"].fmeasure)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by resampling the examples with replacement.

    Paired comparisons pass the examples' differences.
    """
    sample = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _token_f1(prediction: str, answer: str) -> float:
    ours, theirs = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)
