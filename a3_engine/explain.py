"""Which tokens of a prompt were computed, and which came from the cache, drawn over its text."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from a3_engine.report import FusionReport, Trace

Kind = Literal["fresh", "cached", "turn", "recomputed", "kept"]

MEANING: dict[Kind, str] = {
    "fresh": "computed: not in the cache",
    "cached": "cached: keys and values of a stored chunk",
    "turn": "turn: keys and values of a finished turn of the conversation",
    "recomputed": "recomputed: chunk tokens that were computed again",
    "kept": "kept: left in the cache by the turn before",
}
# Light backgrounds, told apart also without red and green; the text on them stays dark.
COLOUR: dict[Kind, str] = {
    "fresh": "#ffffff",
    "cached": "#cfe2f3",
    "turn": "#d5ecd4",
    "recomputed": "#f9b872",
    "kept": "#e0d3ee",
}
# Where frameworks put what a model said of its answer.
CARRIERS = ("report", "raw", "response_metadata", "metadata", "additional_kwargs", "message")


@dataclass(frozen=True)
class Explanation:
    """A prompt as runs of text, each of one kind; a notebook shows it in colours.

    Parameters
    ----------
    report : FusionReport
        Of the explained request.
    runs : tuple of (Kind, str)
        The prompt's text in order.
    tokens : dict
        Tokens of each kind.
    """

    report: FusionReport
    runs: tuple[tuple[Kind, str], ...]
    tokens: dict[Kind, int]

    def __str__(self) -> str:
        counts = [f"  {n:>6} {MEANING[kind]}" for kind, n in self.tokens.items()]
        return "\n".join([str(self.report), "", "Tokens of the prompt", *counts])

    def _repr_html_(self) -> str:
        legend = " ".join(
            _mark(kind, html.escape(f"{MEANING[kind]} ({n})")) for kind, n in self.tokens.items()
        )
        text = "".join(_mark(kind, html.escape(text)) for kind, text in self.runs)
        return (
            "<div style='color:#222;background:#fff;padding:0.5em'>"
            f"<p style='line-height:2'>{legend}</p>"
            f"<div style='white-space:pre-wrap;line-height:1.5'>{text}</div></div>"
        )


def explain(
    answered: object, tokenizer: PreTrainedTokenizerBase, recent: Iterable[FusionReport]
) -> Explanation:
    """Explain a request by its report, or by a response that carries it.

    Parameters
    ----------
    answered : object
        A FusionReport, an Answer, a read stream, or a response of LlamaIndex or LangChain.
    recent : iterable of FusionReport
        The engine's last reports, among which a framework's response names its own.

    Raises
    ------
    ValueError
        The response carries no report, or one that is not kept any more.
    """
    report = _report_of(answered, {report.request_id: report for report in recent})
    if report.trace is None:
        raise ValueError(
            "This report holds no prompt to explain: its request was given up, or the report was "
            "made by hand."
        )
    kinds = _kinds(report.trace, report)
    return Explanation(report, tuple(_runs(tokenizer, report.trace, kinds)), _counts(kinds))


def _report_of(answered: object, recent: Mapping[str, FusionReport]) -> FusionReport:
    for value in _carried(answered):
        if isinstance(value, FusionReport):
            return value
        if isinstance(value, Mapping) and "request_id" in value and "fallback_reason" in value:
            if (known := recent.get(value["request_id"])) is not None:
                return known
            raise ValueError(
                "This response is not among the engine's last requests any more, or another "
                "engine gave it. Keep its FusionReport (llm.last_report), and pass that."
            )
    raise ValueError(
        f"This {type(answered).__name__} carries no FusionReport. Pass the report itself "
        "(llm.last_report), the Answer of engine.generate, the response of an A³ model, or that "
        "of a query engine with an A3Synthesizer."
    )


def _carried(answered: object) -> Iterable[Any]:
    """What a response carries, itself first, then down through the known fields."""
    yield answered
    for name in CARRIERS:
        value = getattr(answered, name, None)
        if value is None or callable(value):
            continue
        yield value
        if isinstance(value, Mapping):
            yield from value.values()
        elif name == "message":
            yield from _carried(value)


def _kinds(trace: Trace, report: FusionReport) -> list[Kind]:
    """The kind of every token."""
    kinds: list[Kind] = ["fresh"] * trace.prompt.n_tokens
    if report.fused:
        for start, segment in trace.prompt.cached:
            kind: Kind = "turn" if segment.owner else "cached"
            kinds[start : start + len(segment.ids)] = [kind] * len(segment.ids)
        kinds[-1] = "fresh"  # whatever it belongs to
    for position in trace.recomputed:
        kinds[position] = "recomputed"
    kinds[: report.reused_turn_tokens] = ["kept"] * report.reused_turn_tokens
    return kinds


def _counts(kinds: list[Kind]) -> dict[Kind, int]:
    counted = Counter(kinds)
    return {kind: counted[kind] for kind in MEANING if counted[kind]}


def _runs(
    tokenizer: PreTrainedTokenizerBase, trace: Trace, kinds: list[Kind]
) -> Iterable[tuple[Kind, str]]:
    """Cut every segment where the kind changes, but never inside a character."""
    position = 0
    for segment in trace.prompt.segments:
        here = kinds[position : position + len(segment.ids)]
        position += len(segment.ids)
        shown = ""
        for stop, kind in enumerate(here, 1):
            if stop < len(here) and here[stop] == kind:
                continue
            text: Any = tokenizer.decode(list(segment.ids[:stop]), skip_special_tokens=False)
            if stop == len(here) or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield kind, text[len(shown) :]
                shown = text


def _mark(kind: Kind, escaped: str) -> str:
    return f"<span style='background:{COLOUR[kind]}'>{escaped}</span>"
