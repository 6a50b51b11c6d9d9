"""Chat templates that write today's date: chunks outlive the day, and prompts have their own."""

from __future__ import annotations

from datetime import datetime

import pytest
import torch
from transformers.utils import chat_template_utils

from a3_engine import A3Engine
from tests.engine.prompts import full_prefill, fused_logits
from tests.texts import ASK
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

# As Llama 3.1's and 3.2's: a date may be given, else it is today's.
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + CHATML
)
CHUNKS = [
    "The lamp of the lighthouse burns through the night.",
    "The northern shore is steep, and few boats land there.",
]


@pytest.fixture
def today(monkeypatch):
    """Sets the day."""

    def set_day(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 3, day, 12)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


@pytest.fixture
def engine(tmp_path):
    engines = []

    def build() -> A3Engine:
        tokenizer = tiny_tokenizer(DATED)
        engines.append(A3Engine.from_pretrained(tiny_model("llama"), tokenizer, cache_dir=tmp_path))
        return engines[-1]

    yield build
    for each in engines:
        each.close()


def hits(engine: A3Engine) -> list[bool]:
    report = engine.generate(ASK, chunks=CHUNKS, max_new_tokens=1).report
    return [chunk.hit for chunk in report.chunks]


def test_chunks_outlive_the_day(engine, today):
    """In a new engine of the next day, and in one that runs past midnight."""
    today(1)
    first = engine()
    first.precompute(CHUNKS, progress=False)
    assert hits(first) == [True, True]
    today(2)
    assert hits(first) == hits(engine()) == [True, True]


def test_a_prompt_has_its_own_day(engine, today):
    own = engine()
    for day in (1, 2):
        today(day)
        text = own.runtime.tokenizer.decode(own.plan(ASK, CHUNKS).ids)
        assert f"0{day} Mar 2026" in text


def test_the_first_chunk_is_exact_behind_what_it_was_computed_behind_alone(engine, today):
    today(1)
    own = engine()
    prompt = own.plan(ASK, CHUNKS)
    assert not any(span.exact for span in prompt.layout(own.runtime.planner.prefix_ids).chunks)
    expected = full_prefill(own, prompt).logits[0, -1]
    for selector in ("mend", "a3"):
        logits = fused_logits(own, prompt, selector, 1.0)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
