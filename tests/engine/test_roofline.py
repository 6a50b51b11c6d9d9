"""What a pass is said to need is what torch counts that it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from a3_engine.benchmark.roofline import Part, Shape, Work, work
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.model.attention import has_window
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.masks import LocalGlobal
from tests.tiny import CONFIGS, WINDOW, tiny_model

FP32 = 4  # bytes
TEXTS = ["The lamp burns through the night.", "The keeper of the harbour is called Ada."]
QUESTION = "Who keeps the lamp?"


def counted(call) -> dict[str, int]:
    """Floating-point operations of linear layers and of products of activations."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    by = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = by.get("aten.mm", 0) + by.get("aten.addmm", 0)
    return {"linear": linear, "attention": by.get("aten.bmm", 0)}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"lfm2"}))  # whose layers all attend
def test_the_weights_are_those_of_the_models_linear_layers(name):
    model = tiny_model(name)
    shape = Shape.of(model.config)
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    assert shape.weights == sum(each.weight.numel() for each in linear)
    assert [bool(window) for window in shape.windows] == has_window(model)


def test_a_prompt_fed_token_by_token_does_exactly_the_counted_work():
    """Each step then attends to no key after its own, as a full prefill ideally does."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    ids, cache = list(range(5, 25)), DynamicCache()

    def feed() -> None:
        for token in ids:
            model.model(input_ids=torch.tensor([[token]]), **with_cache(model.model, cache))

    shape = Shape.of(model.config)
    needed, done = work(shape, [torch.arange(len(ids))] * shape.layers, FP32), counted(feed)
    assert needed.linear.flops == done["linear"]
    assert needed.attention.flops == done["attention"]


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_a_fusion_pass_does_the_linear_work_of_its_rows(ratio, tiny_engine):
    engine = tiny_engine("llama")
    model = engine.runtime.model
    prompt, cache = engine.prepare(QUESTION, chunks=TEXTS, selector="random", ratio=ratio)
    rows = cache.fusion.rows
    assert (len(rows) == prompt.n_tokens) == (ratio == 1.0)

    def run() -> None:
        model(input_ids=torch.tensor([prompt.ids]), **with_cache(model, cache), logits_to_keep=1)

    shape = Shape.of(model.config)
    needed = work(shape, [rows] * shape.layers, FP32)
    assert needed.linear.flops + needed.logits.flops == counted(run)["linear"]


def test_a_narrowed_pass_does_the_work_of_fewer_rows(tiny_engine):
    engine = tiny_engine("llama")
    model, shape = engine.runtime.model, Shape.of(engine.runtime.model.config)
    pruning = Mend(ratio=0.5, least=0, narrow=((1 / shape.layers, 0.25),))
    prompt, cache = engine.prepare(QUESTION, chunks=TEXTS, selector=pruning)
    rows, done = cache.fusion.rows, []
    # Finding what goes on takes products that are not the model's.
    hooks = [
        each.register_forward_hook(
            lambda linear, args, _: done.append(2 * linear.weight.numel() * args[0].shape[1])
        )
        for each in model.modules()
        if isinstance(each, nn.Linear)
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt.ids]), **with_cache(model, cache), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    fewer = cache.fusion.rows
    assert len(fewer) < len(rows)
    needed = work(shape, [rows] + [fewer] * (shape.layers - 1), FP32)
    assert needed.linear.flops + needed.logits.flops == sum(done)


def test_windows_bound_what_a_row_attends_to():
    shape = Shape.of(CONFIGS["gemma3"])
    rows = torch.tensor([0, 3, 11, 12, 13, 40, 45])
    keys = torch.arange(46)
    causal = keys <= rows[:, None]
    inside = causal & (keys > rows[:, None] - WINDOW)
    masks = [inside if window else causal for window in shape.windows]
    assert {bool(window) for window in shape.windows} == {True, False}
    needed = work(shape, [rows] * shape.layers, FP32)
    attended = sum(int(mask.sum()) for mask in masks)
    assert needed.attention.flops == 4 * shape.head_dim * shape.heads * attended
    read = sum(int(mask.any(0).sum()) for mask in masks)
    written = shape.layers * len(rows)
    assert needed.attention.nbytes == FP32 * shape.kv_elements * (read + written)


def test_rows_that_see_what_is_near_are_counted_key_by_key():
    shape = Shape.of(CONFIGS["llama"])
    rows, until, tokens = torch.tensor([0, 3, 11, 12, 13, 40, 45, 46]), 45, 4
    keys, at = torch.arange(47), rows[:, None]
    causal = keys <= at
    shared = torch.tensor([0, 2, 11, 30, 38, 44])
    near = causal & (torch.isin(keys, shared) | (keys > at - tokens) | (at >= until))
    needed = work(shape, [rows] * shape.layers, FP32, (1, LocalGlobal(shared, tokens, until)))
    attended = int(causal.sum()) + (shape.layers - 1) * int(near.sum())
    assert needed.attention.flops == 4 * shape.head_dim * shape.heads * attended


def test_the_limit_is_reached_by_the_slower_of_computing_and_moving():
    needed = Work(Part(100, 10), Part(10, 100), Part(4, 0))
    assert needed.seconds(matmul=10, copy=10) == 10 + 10 + 0.4
    assert needed.seconds(matmul=10, copy=10, attention=0.5) == 10 + 20 + 0.4
    assert (needed.flops, needed.nbytes) == (114, 110)
