"""What people see: a report as a table, a prompt in colours, and errors that name the way out."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from a3_engine import Chunk, FusionReport, Message
from a3_engine.explain import COLOUR
from tests.texts import ASK

LAMP = "The lamp of the lighthouse burns through the night — 夜通し 🙂 naïve."
SHORE = "The <b>northern</b> shore is steep & few boats land there."


class Shown(HTMLParser):
    """Text by background colour, and the tags met."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.spans: list[tuple[str, str]] = []
        self._colour = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "span":
            self._colour = dict(attrs)["style"].removeprefix("background:")
            self.spans.append((self._colour, ""))

    def handle_data(self, data):
        if self.spans:
            colour, text = self.spans[-1]
            self.spans[-1] = (colour, text + data)


@pytest.fixture
def answer(tiny_engine):
    engine = tiny_engine()
    engine.precompute([LAMP, SHORE], progress=False)
    parts = [Chunk(LAMP), "\n", Chunk(SHORE), f"\n{ASK}"]
    return engine, engine.generate([Message("user", parts)], ratio=0.3, max_new_tokens=4)


def test_the_runs_are_the_prompt_and_count_as_the_report_does(answer):
    engine, answered = answer
    report = answered.report
    explanation = engine.explain(answered)
    ids = report.trace.prompt.ids
    assert "".join(text for _, text in explanation.runs) == engine.runtime.tokenizer.decode(ids)
    counts = explanation.tokens
    assert sum(counts.values()) == report.prompt_tokens
    assert counts["recomputed"] == report.recomputed_tokens > 0
    assert counts["fresh"] == report.fresh_tokens
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(text for _, text in explanation.runs)
    for number in counts.values():
        assert str(number) in str(explanation)


def test_a_notebook_shows_colours_a_legend_and_no_markup_of_the_text(answer):
    engine, answered = answer
    explanation = engine.explain(answered.report)
    shown = Shown(explanation._repr_html_())
    assert shown.tags == {"div", "p", "span"}  # none of the chunk's own
    legend, spans = shown.spans[: len(explanation.tokens)], shown.spans[len(explanation.tokens) :]
    assert [colour for colour, _ in legend] == [COLOUR[kind] for kind in explanation.tokens]
    assert [(COLOUR[kind], text) for kind, text in explanation.runs] == spans
    assert SHORE in "".join(text for _, text in spans)


def test_a_kept_turn_and_a_full_prefill_have_their_own_colours(tiny_engine):
    engine = tiny_engine()
    first = engine.generate(ASK, chunks=[LAMP], max_new_tokens=4)
    kept = engine.runtime.prefix_cache._prefixes[-1]
    prompt = first.report.trace.prompt
    more = replace(prompt.segments[-1], ids=(*kept.ids[kept.n_prompt :], 40, 41))
    longer = replace(prompt, segments=(*prompt.segments, more))
    report = engine.generate(longer, max_new_tokens=2).report
    tokens = engine.explain(report).tokens
    assert tokens["kept"] == report.reused_turn_tokens > 0
    assert tokens["fresh"] == report.fresh_tokens
    plain = engine.generate(ASK, chunks=[LAMP], selector="full_prefill", max_new_tokens=2)
    assert engine.explain(plain).tokens == {"fresh": plain.report.prompt_tokens}


def test_a_response_leads_back_to_its_report(answer):
    """By the plain values that frameworks carry; a stream and an answer by the report itself."""
    engine, answered = answer

    class Response:
        metadata = None
        raw = {"usage": {}, "a3": answered.report.to_dict()}  # noqa: RUF012

    stream = engine.stream(ASK, max_new_tokens=2)
    list(stream)
    assert engine.explain(Response()).report is answered.report
    assert engine.explain(stream).report is stream.report
    assert engine.explain(answered.report).runs == engine.explain(answered).runs


def test_what_carries_no_report_is_refused(answer):
    engine, _ = answer
    with pytest.raises(ValueError, match="str carries no FusionReport"):
        engine.explain("an answer")
    with pytest.raises(ValueError, match="given up"):
        engine.explain(FusionReport())

    class Response:
        response_metadata = {"a3": FusionReport().to_dict()}  # noqa: RUF012

    with pytest.raises(ValueError, match="another engine"):
        engine.explain(Response())


def test_a_report_is_a_table_with_its_counts(answer):
    _, answered = answer
    table = answered.report._repr_html_()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table)
    lines = str(answered.report).splitlines()[1:]
    assert [html.unescape(cell) for cell in cells] == [line[14:] for line in lines]
    odd = FusionReport(model="<script>", fallback_reason="a & b")
    assert "<script>" not in odd._repr_html_()
    assert "&lt;script&gt; · ordinary prefill (a &amp; b)" in odd._repr_html_()


@pytest.mark.parametrize("ratio", ["15%", "0.15", 15, -0.1, float("nan"), None])
def test_a_ratio_that_is_none_says_what_one_is(tiny_engine, ratio):
    engine = tiny_engine()
    if ratio is None:  # the method's own
        assert engine.generate(ASK, ratio=None, max_new_tokens=1).report.ratio == 0.05
        return
    with pytest.raises(ValueError, match=r"between 0 and 1.*0\.15 recomputes 15 %"):
        engine.generate(ASK, ratio=ratio)
