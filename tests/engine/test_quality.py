"""`quality`: three methods by what they are good for, on the engine and in both integrations."""

from __future__ import annotations

import pytest
import torch
from langchain_core.messages import HumanMessage

from a3_engine.fusion.selectors import DEFAULT, QUALITIES, SELECTORS, make_selector
from a3_engine.layout import Layout, Span
from a3_integrations.langchain import ChatA3
from a3_integrations.llama_index import A3LLM

TEXTS = ["The lighthouse stands on the northern shore.", "Its lamp burns through the night."]
MEANT = {
    "fast": ("full_reuse", 0.0),
    "balanced": (DEFAULT, SELECTORS[DEFAULT]().ratio),
    "exact": ("full_prefill", 1.0),
}


def how(report) -> tuple[str, float]:
    return report.selector, report.ratio


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_quality_is_its_selector_at_its_ratio(tiny_engine, quality):
    selector, ratio = MEANT[quality]
    asked = {"chunks": TEXTS, "max_new_tokens": 2}
    own = None if quality == "balanced" else ratio
    named = tiny_engine(selector=selector, ratio=own).generate("Who?", **asked)
    assert how(named.report) == MEANT[quality]
    for answer in (
        tiny_engine(quality=quality).generate("Who?", **asked),
        tiny_engine(selector="a3", ratio=0.3).generate("Who?", quality=quality, **asked),
    ):
        assert how(answer.report) == MEANT[quality]
        assert answer.text == named.text


def test_the_default_is_balanced_and_a_request_may_refine_it(tiny_engine):
    engine = tiny_engine()
    assert engine.selector == QUALITIES["balanced"]
    report = engine.generate("Who?", chunks=TEXTS, ratio=0.5, max_new_tokens=2).report
    assert how(report) == (DEFAULT, 0.5)


@pytest.mark.parametrize("n_chunk_tokens", [40, 128, 1000, 4000])
def test_short_prompts_have_a_least_number_recomputed_unless_a_ratio_is_asked_for(n_chunk_tokens):
    n_exact, asks = 10, torch.tensor([n_chunk_tokens])
    spans = (Span(0, 30, exact=n_exact), Span(30, n_chunk_tokens))
    layout = Layout(n_chunk_tokens + 1, spans, 0, asks, asks)
    attention = torch.rand(3, n_chunk_tokens + 1)
    method = QUALITIES["balanced"]
    most = n_chunk_tokens - n_exact
    expected = max(int(0.05 * n_chunk_tokens), min(128, most))
    assert len(method.select(layout, attention)) == expected
    assert len(method.at(0.05).select(layout, attention)) == int(0.05 * n_chunk_tokens)
    assert make_selector(DEFAULT, 0.05) == method.at(0.05) != method == make_selector(DEFAULT)


@pytest.mark.parametrize(
    "setting",
    [{"quality": "best"}, {"quality": "fast", "ratio": 0.1}, {"quality": "fast", "selector": "a3"}],
)
def test_what_contradicts_itself_or_is_unknown_says_so_at_once(tiny_engine, setting):
    engine = tiny_engine()
    with pytest.raises(ValueError, match="quality"):
        tiny_engine(**setting)
    with pytest.raises(ValueError, match="quality"):
        engine.generate("Who?", **setting)
    for cls in (ChatA3, A3LLM):
        with pytest.raises(ValueError, match="quality"):
            cls(engine=engine, **setting)


def test_a_call_goes_before_settings(tiny_engine):
    """In both frameworks: a call's quality stands for the settings' selector, and the reverse."""
    engine = tiny_engine()

    def chat(call: dict, **settings):
        llm = ChatA3(engine=engine, max_tokens=2, **settings)
        llm.invoke([HumanMessage("Who keeps the lamp?")], **call)
        return how(engine.runtime.reports[-1])

    def complete(call: dict, **settings):
        llm = A3LLM(engine=engine, max_new_tokens=2, **settings)
        llm.complete("Who keeps the lamp?", **call)
        return how(engine.runtime.reports[-1])

    for ask in (chat, complete):
        assert ask({}, quality="fast") == MEANT["fast"]
        assert ask({"quality": "exact"}, selector="a3", ratio=0.3) == MEANT["exact"]
        assert ask({"selector": "a3", "ratio": 0.3}, quality="fast") == ("a3", 0.3)
        assert ask({"ratio": 0.3}, quality="fast") == (DEFAULT, 0.3)
        assert ask({}, selector="a3", ratio=0.3) == ("a3", 0.3)
