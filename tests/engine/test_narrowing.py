"""Narrowing: which rows go on, and what becomes of those that do not."""

from __future__ import annotations

import pytest
import torch

from a3_engine.fusion.layer_pruning import LayerPruning
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.layout import Layout, Span
from a3_engine.model.masks import RowMask
from tests.engine.passes import run
from tests.engine.prompts import build_prompt
from tests.tiny import CONFIGS

SHAPE = ["prefix", "fresh", 9, "fresh", 14, "fresh"]
RATIO, SHARE = 0.5, 0.4


def at_layer(n_layers: int, layer: int) -> float:
    """A depth that becomes this layer."""
    return (layer - 0.5) / n_layers


def attended_by(query, key, rows, question, scaling) -> torch.Tensor:
    """The most that any of the question's tokens attends to each key, by plain softmax in fp64."""
    group = query.shape[1] // key.shape[1]
    most = torch.zeros(key.shape[2], dtype=torch.float64)
    for token in question.tolist():
        row = rows.positions.tolist().index(token)
        mean = torch.zeros_like(most)
        for head in range(query.shape[1]):
            scores = key[0, head // group].double() @ query[0, head, row].double() * scaling
            scores[token + 1 :] = float("-inf")
            mean += torch.softmax(scores, 0) / query.shape[1]
        most = torch.maximum(most, mean)
    return most


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "smollm3"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_most_attended_go_on(tiny_engine, name, layer):
    engine = tiny_engine(name)
    n_layers = engine.runtime.model.config.num_hidden_layers
    if layer >= n_layers:
        pytest.skip("the model has fewer layers")
    prompt = build_prompt(engine, SHAPE)
    layout = prompt.layout(engine.runtime.planner.prefix_ids)
    seen = {}

    def observe(index, query, key, rows, scaling):
        seen[index] = attended_by(query, key, rows, layout.question, scaling)

    narrow = ((at_layer(n_layers, layer), SHARE),)
    cache = run(engine, prompt, Mend(ratio=RATIO, least=0, narrow=narrow), observe)
    selected, left = cache.fusion.selected, cache.fusion.pruning.survivors[layer]
    ranked = sorted(selected.tolist(), key=lambda position: -float(seen[layer - 1][position]))
    assert 0 < len(left) < len(selected)
    assert left.tolist() == sorted(ranked[: round(SHARE * len(selected))])


def test_a_layer_that_attends_to_everything_says_what_goes_on():
    """Not the sliding one just below: the question sees no chunk there."""
    layout = Layout(40, (Span(2, 36),), 2, torch.arange(36, 40), torch.arange(36, 40))
    selected, seen = torch.arange(2, 12), []
    pruning = LayerPruning({4: 0.5, 9: 0.1}, [False, True, True, True] * 2, layout, selected, "max")
    rows = RowMask(torch.cat([selected, layout.fresh]))
    for layer in range(8):
        if pruning.prunes_at(layer):
            seen.append((layer, pruning.pick(layer).tolist()))
        key = torch.zeros(1, 1, 40, 4)
        key[0, 0, 2 + layer : 7 + layer] = 9.0  # what this layer would say
        pruning.observe(layer, torch.ones(1, 2, len(rows.positions), 4), key, rows, 1.0)
    assert seen == [(4, [2, 3, 4, 5, 6])]
    assert list(pruning.survivors) == [4]


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_goes_on_is_computed_from_there(tiny_engine, name):
    """Below the stage nothing differs; from it on the others keep what was stored."""
    engine = tiny_engine(name)
    n_layers = engine.runtime.model.config.get_text_config().num_hidden_layers
    prompt = build_prompt(engine, SHAPE)
    stage = n_layers - 1
    narrow = ((at_layer(n_layers, stage), SHARE),)
    narrowed = run(engine, prompt, Mend(ratio=RATIO, least=0, correction=None, narrow=narrow))
    whole = run(engine, prompt, Mend(ratio=RATIO, least=0, correction=None, narrow=()))
    _, stored = engine.prepare(prompt, selector="full_reuse")
    left = narrowed.fusion.pruning.survivors[stage]
    dropped = whole.fusion.selected[~torch.isin(whole.fusion.selected, left)]
    assert len(dropped)
    for layer in range(n_layers):
        for mine, theirs, before in zip(
            *(cache.layers[layer].stored() for cache in (narrowed, whole, stored)), strict=True
        ):
            if layer < stage:
                torch.testing.assert_close(mine, theirs)
            else:
                assert torch.equal(mine[:, :, dropped], before[:, :, dropped])
                torch.testing.assert_close(mine[:, :, left], theirs[:, :, left])
                assert not torch.allclose(theirs[:, :, dropped], before[:, :, dropped])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_share_of_one_changes_nothing(tiny_engine, name):
    engine = tiny_engine(name)
    n_layers = engine.runtime.model.config.get_text_config().num_hidden_layers
    prompt = build_prompt(engine, SHAPE)
    same = run(engine, prompt, Mend(ratio=RATIO, least=0, narrow=((at_layer(n_layers, 1), 1.0),)))
    whole = run(engine, prompt, Mend(ratio=RATIO, least=0, narrow=()))
    for mine, theirs in zip(same.layers, whole.layers, strict=True):
        for one, other in zip(mine.stored(), theirs.stored(), strict=True):
            torch.testing.assert_close(one, other)


def test_the_trace_tells_what_each_layer_computed(demo_engine):
    report = demo_engine.generate(
        "Which river is the longest?",
        chunks=["The Amazon carries the most water of all rivers. " * 8, "The Nile is long. " * 9],
        ratio=0.3,
        max_new_tokens=2,
    ).report
    by_layer = report.trace.recomputed_by_layer(30)
    counts = [len(positions) for positions in by_layer]
    n_all = report.recomputed_tokens
    assert (
        counts
        == [n_all] * 15
        + [round(0.7 * n_all)] * 3
        + [round(0.45 * n_all)] * 6
        + [round(0.15 * n_all)] * 6
    )
    assert set(by_layer[29]) < set(by_layer[20]) < set(by_layer[15]) < set(by_layer[0])


@pytest.mark.parametrize(
    "narrow",
    [
        ((0.0, 0.5),),
        ((1.0, 0.5),),
        ((0.5, 1.5),),
        ((0.6, 0.5), (0.4, 0.2)),
        ((0.4, 0.2), (0.6, 0.5)),
    ],
)
def test_stages_that_make_no_sense_are_refused(narrow):
    with pytest.raises(ValueError, match="narrow takes pairs of a depth"):
        Mend(narrow=narrow)
