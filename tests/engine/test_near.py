"""Rows that see what is shared and what is near, instead of everything before them."""

import pytest
import torch

from a3_engine.fusion.selectors.mend import LEAST_SHARE, Mend
from a3_engine.layout import Layout, Span
from a3_engine.model.attention import attend_rows
from a3_engine.model.masks import LocalGlobal, RowMask
from tests.engine.passes import run
from tests.engine.prompts import build_prompt
from tests.tiny import CONFIGS

SHAPE = ["prefix", "fresh", 150, "fresh", 140, "fresh"]


class Layer:
    layer_idx = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 16])
def test_rows_see_the_shared_the_near_and_at_the_end_everything(dtype, window):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 300, 32, dtype=dtype)
    key, value = (torch.randn(1, 2, 1000, 32, dtype=dtype) for _ in "kv")
    positions = torch.randperm(1000)[:300].sort().values
    shared, until = torch.unique(torch.cat([positions, torch.arange(3)])), 950
    rows = RowMask(positions, local_global=LocalGlobal(shared, window, until))
    got = attend_rows(Layer(), query, key, value, rows, scaling=0.2)[0].transpose(0, 1)

    where, at = torch.arange(1000), positions[:, None]
    sees = torch.isin(where, shared) | (where > at - window) | (at >= until)
    wide = [states[0].double().repeat_interleave(2, 0) for states in (key, value)]
    scores = (query[0].double() @ wide[0].transpose(1, 2) * 0.2).masked_fill(
        ~(sees & (where <= at)), float("-inf")
    )
    expected = scores.softmax(-1) @ wide[1]
    tolerance = 1e-5 if dtype == torch.float32 else 0.006
    assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_lower_layers_see_everything(tiny_engine, name):
    """Above them the keys and values differ, for those are made of what was seen below."""
    engine = tiny_engine(name)
    prompt = build_prompt(engine, SHAPE)
    local_global = run(
        engine, prompt, Mend(ratio=0.1, least=0, narrow=(), correction=None, long_tokens=1)
    )
    whole = run(engine, prompt, Mend(ratio=0.1, least=0, narrow=(), correction=None))
    n_layers = len(whole.layers)
    first = Mend(long_tokens=1).local_from(n_layers, 1000)
    assert 0 < first < n_layers
    at, rule = local_global.fusion.local_global
    assert at == first
    assert torch.isin(local_global.fusion.rows, rule.global_positions).all()
    for layer in range(first + 1):  # keys of a layer are made of what is below
        for ours, theirs in zip(
            local_global.layers[layer].stored(), whole.layers[layer].stored(), strict=True
        ):
            assert torch.equal(ours, theirs)
    if first < n_layers - 1 and not any(layer.is_sliding for layer in whole.layers):
        last = [list(cache.layers[-1].stored()) for cache in (local_global, whole)]
        assert not torch.equal(last[0][1], last[1][1])


def test_longer_prompts_cost_no_more_scores_until_a_third_of_the_layers():
    method, n_layers = Mend(), 30
    assert method.local_from(n_layers, method.long_tokens) is None
    most, least = n_layers * method.long_tokens**2, n_layers * LEAST_SHARE
    before = n_layers
    for n_tokens in range(method.long_tokens + 1, 4 * method.long_tokens, 100):
        layers = method.local_from(n_layers, n_tokens)
        assert layers <= before
        assert layers == least or (layers - 1) * n_tokens**2 <= most
        before = layers
    assert before == least


def test_long_tokens_are_counted():
    with pytest.raises(ValueError, match="long_tokens"):
        Mend(long_tokens=-1)


def test_all_attend_to_what_the_question_attends_to_most_exact_or_not():
    """A first chunk just after what it was computed after is never picked, but it is seen."""
    chunks = (Span(4, 40, exact=36), Span(40, 80), Span(80, 120))
    fresh = torch.cat([torch.arange(4), torch.arange(120, 124)])
    layout = Layout(124, chunks, 4, fresh, question=torch.arange(120, 124))
    attention = torch.full((2, 124), 0.001)
    attention[:, [7, 20, 33, 50, 90]] = 0.1
    method = Mend(ratio=0.05, least=0, long_tokens=10)
    picked = method.select(layout, attention)
    _, local_global = method.local_global(layout, attention, 6)
    assert not torch.isin(picked, torch.arange(4, 40)).any()
    assert torch.isin(
        torch.cat([picked, fresh, torch.tensor([7, 20, 33])]), local_global.global_positions
    ).all()
    assert len(local_global.global_positions) < 40
    assert local_global.dense_from == 120
