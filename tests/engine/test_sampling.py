"""How tokens are chosen: as the request says, and by nothing else."""

from __future__ import annotations

import pytest
import torch

from a3_engine import Message
from a3_engine.decoding.sampling import draw
from tests.texts import ASK, LAMP


def test_tokens_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    likely = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(likely.expand(20_000, -1))
    shares = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    assert (shares[likely == 0] == 0).all()
    assert torch.allclose(shares, likely, atol=0.02)  # six standard deviations


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_drawn_from_broken_logits(value):
    logits = torch.tensor([[1.0, value, 2.0]])
    with pytest.raises(RuntimeError, match="not finite"):
        draw(logits.softmax(-1))


def test_a_sampled_answer(endless):
    """Seeds repeat it, temperature varies it, and restrictions to one token make it greedy."""

    def text(seed: int = 0, **sampling: float) -> str:
        torch.manual_seed(seed)
        return endless.generate(ASK, chunks=[LAMP], max_new_tokens=30, **sampling).text

    greedy = text()
    assert text(1, temperature=1.0) == text(1, temperature=1.0)
    assert len({text(seed, temperature=1.0) for seed in range(4)}) == 4
    assert text(temperature=1.0, top_k=1) == text(temperature=1.0, top_p=1e-6) == greedy
    assert text(temperature=1.0, top_k=50, top_p=0.9) != greedy
    assert text(seed=5) == greedy != text(repetition_penalty=5.0)


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"num_beams": 3},
        {"max_length": 5, "min_new_tokens": 50},
        {"use_cache": False},
    ],
    ids=str,
)
def test_a_models_own_generation_defaults_do_not_leak_in(endless, own):
    """What is not asked for is off, greedy and sampled, fused and not; so the cache is used."""

    def texts() -> list[str]:
        answers = []
        for temperature in (0.0, 1.0):
            for selector in ("a3", "full_prefill"):
                torch.manual_seed(0)
                options = {"temperature": temperature, "selector": selector, "max_new_tokens": 16}
                answers.append(endless.generate(ASK, chunks=[LAMP], **options).text)
        return answers

    expected = texts()
    endless.runtime.model.generation_config.update(**own)
    assert texts() == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("repetition_penalty", -1.0),
    ],
)
async def test_settings_out_of_range_are_refused(tiny_engine, name, value):
    """At once, by name and value, however the answer is asked for."""
    engine = tiny_engine()
    for ask in (engine.generate, engine.stream):
        with pytest.raises(ValueError, match=rf"{name}.*{value}"):
            ask(ASK, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        await engine.agenerate(ASK, **{name: value})
    with pytest.raises(ValueError, match="empty"):
        engine.stream(" ")
    with pytest.raises(ValueError, match="chunks"):
        engine.generate([Message("user", ASK)], chunks=[LAMP])
