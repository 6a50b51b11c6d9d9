"""What compression keeps, against naive second implementations, and what it leaves as it is."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from a3_engine import A3Engine
from a3_engine.decoding.compression import COMPRESSIONS, make_compression
from a3_engine.decoding.compression.h2o import H2O
from a3_engine.decoding.compression.laq import LAQ, LAQPlusPlus
from a3_engine.decoding.compression.snapkv import SnapKV
from a3_engine.decoding.compression.streaming_llm import Streaming
from a3_engine.fusion.cache import FusedCache
from a3_engine.model.attention import has_window
from a3_engine.model.cache_argument import with_cache
from a3_engine.segments import Prompt
from tests.engine.prompts import build_prompt
from tests.engine.turning import turned
from tests.tiny import CONFIGS, tiny_model

SHAPE = ["prefix", "fresh", 19, "fresh", 24, "fresh"]
EVICTED = torch.finfo(torch.float32).min


def passed(engine: A3Engine, prompt: Prompt, **method) -> tuple[FusedCache, int]:
    """A completed pass, not compressed yet, and the answer's first token."""
    _, cache = engine.prepare(prompt, **method)
    with torch.inference_mode():
        logits = engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, cache)
        ).logits
    return cache, int(logits[0, -1].argmax())


def kept(engine: A3Engine, prompt: Prompt, compression) -> list[list[set[int]]]:
    """By layer and head, the positions that stay after a full prefill: keys tell them apart."""
    cache, token = passed(engine, prompt, selector="full_prefill", compression=compression)
    before = [keys[0].clone() for keys, _ in cache.stored()]
    cache.compressor.compress(engine.runtime.model, cache, token)
    places = []
    for full, (keys, _) in zip(before, cache.stored(), strict=True):
        match = (full[:, None] == keys[0][:, :, None]).all(-1)  # (heads, kept, tokens)
        assert bool((match.sum(-1) == 1).all())
        places.append([set(head.nonzero()[:, 1].tolist()) for head in match])
    return places


def eager(name: str, prompt: Prompt):
    """The model with eager attention, its attentions for the prompt, and its cache."""
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    cache = DynamicCache()
    with torch.inference_mode():
        output = model(
            torch.tensor([prompt.ids]), **with_cache(model, cache), output_attentions=True
        )
    return model, output, cache


def best(scores: list[float], budget: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: -scores[j])[:budget])


def naive_snapkv(attention, budget: int, window: int, kernel: int, largest: bool) -> list[set]:
    """One layer's attentions ``(heads, rows, tokens)`` of a model with two KV heads."""
    heads, n, _ = attention.shape
    chosen = []
    for group in attention.view(2, heads // 2, n, n):
        sums = [
            sum(float(head[i, j]) for head in group for i in range(n - window, n))
            for j in range(n - window)
        ]
        scores = []
        for j in range(n - window):
            near = [
                sums[k] if 0 <= k < n - window else 0.0
                for k in range(j - kernel // 2, j + kernel // 2 + 1)
            ]
            scores.append(max(near) if largest else sum(near) / kernel)
        chosen.append(best(scores, budget - window) | set(range(n - window, n)))
    return chosen


@pytest.mark.parametrize(("kernel", "pooling"), [(1, "avg"), (5, "avg"), (7, "max")])
def test_snapkv_keeps_what_its_description_keeps(tiny_engine, kernel, pooling):
    engine = tiny_engine("llama")
    prompt = build_prompt(engine, SHAPE)
    _, output, _ = eager("llama", prompt)
    method = SnapKV(keep=0.4, window=6, kernel=kernel, pooling=pooling)
    ours = kept(engine, prompt, method)
    budget = int(prompt.n_tokens * 0.4)
    for layer, attention in zip(ours, output.attentions, strict=True):
        assert layer == naive_snapkv(attention[0], budget, 6, kernel, pooling == "max")


def test_h2o_keeps_heavy_hitters_and_the_last_tokens(tiny_engine):
    engine = tiny_engine("llama")
    prompt = build_prompt(engine, SHAPE)
    _, output, _ = eager("llama", prompt)
    n, budget = prompt.n_tokens, int(prompt.n_tokens * 0.4)
    recent = int(budget * 0.5)
    for layer, attention in zip(
        kept(engine, prompt, H2O(keep=0.4)), output.attentions, strict=True
    ):
        for ours, group in zip(layer, attention[0].view(2, -1, n, n), strict=True):
            sums = group.sum(dim=(0, 1)).tolist()[: n - recent]
            assert ours == best(sums, budget - recent) | set(range(n - recent, n))


def test_streaming_keeps_the_ends(tiny_engine):
    engine = tiny_engine("llama")
    prompt = build_prompt(engine, SHAPE)
    n, budget = prompt.n_tokens, int(prompt.n_tokens * 0.4)
    expected = set(range(4)) | set(range(n - budget + 4, n))
    for layer in kept(engine, prompt, Streaming(keep=0.4)):
        assert layer == [expected, expected]


@pytest.mark.parametrize("method", [LAQ, LAQPlusPlus])
def test_laq_selects_as_a_naive_implementation_does(tiny_engine, method):
    """Stage 1, eight drafted tokens on it with masks for what is gone, and the second selection."""
    engine = tiny_engine("llama")
    engine.runtime.model.generation_config.eos_token_id = None
    prompt = build_prompt(engine, SHAPE)
    model, output, cache = eager("llama", prompt)
    n, budget, window, kernel = prompt.n_tokens, int(prompt.n_tokens * 0.4), 6, 7
    full_keys = [layer.keys[0].clone() for layer in cache.layers]
    stage1 = [
        naive_snapkv(attention[0], budget, window, kernel, True) for attention in output.attentions
    ]

    entering: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def evict(index):
        def hook(module, args, kwargs):
            entering[index].append(kwargs["hidden_states"][0, 0])
            length = n + len(entering[index])
            mask = torch.zeros(1, 8, 1, length)
            for head in range(8):
                gone = sorted(set(range(n)) - stage1[index][head // 4])
                mask[0, head, 0, gone] = EVICTED
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(evict(index), with_kwargs=True)
    token = int(output.logits[0, -1].argmax())
    with torch.inference_mode():
        for _ in range(8):
            logits = model(torch.tensor([[token]]), **with_cache(model, cache)).logits
            token = int(logits[0, -1].argmax())

    rows = method().prompt_rows
    theta = model.config.rope_parameters["rope_theta"]
    ours = kept(engine, prompt, method(keep=0.4, window=window, kernel=kernel))
    for index, layer in enumerate(model.model.layers):
        for group in range(2):
            sums = [0.0] * n
            for step, hidden in enumerate(entering[index]):
                with torch.inference_mode():
                    projected = layer.self_attn.q_proj(hidden).view(8, 16)
                for head in range(4 * group, 4 * group + 4):
                    query = turned(projected[head], n + step, theta)
                    weights = torch.softmax(full_keys[index][group] @ query / 4.0, dim=0)
                    sums = [a + b for a, b in zip(sums, weights.tolist(), strict=True)]
            for row in range(n - rows, n):
                for head in range(4 * group, 4 * group + 4):
                    weights = output.attentions[index][0, head, row]
                    sums = [a + b for a, b in zip(sums, weights.tolist(), strict=True)]
            sums = sums[: n - rows]
            scores = [max(sums[max(0, j - 3) : j + 4]) for j in range(n - rows)]
            expected = best(scores, budget - rows) | set(range(n - rows, n))
            assert ours[index][group] == expected


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_keeping_everything_changes_nothing(tiny_engine, name, architecture):
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, SHAPE)
    plain = engine.generate(prompt, max_new_tokens=16)
    all_kept = engine.generate(prompt, compression=name, keep=1.0, max_new_tokens=16)
    assert all_kept.text == plain.text
    assert all_kept.report.kv_bytes == plain.report.kv_bytes
    assert all_kept.report.compression == name


@pytest.mark.parametrize("architecture", CONFIGS)
def test_decoding_sees_exactly_what_was_kept(tiny_engine, architecture):
    """Against an ordinary cache with a mask over what is gone, several tokens at once."""
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, SHAPE)
    n, answer = prompt.n_tokens, [7, 11, 5, 300]
    cache, token = passed(engine, prompt, selector="full_prefill", compression=Streaming(keep=0.3))
    cache.compressor.compress(engine.runtime.model, cache, token)
    if not all(layer.shape.attends for layer in cache.layers):
        pytest.skip("a hybrid masks several tokens at once by its first layer, which is not cut")
    gone = set(range(n)) - (set(range(4)) | set(range(n - int(n * 0.3) + 4, n)))
    with torch.inference_mode():
        ours = engine.runtime.model(
            torch.tensor([answer]), **with_cache(engine.runtime.model, cache)
        ).logits[0]

    model, _, full = eager(architecture, prompt)
    windows = has_window(model)

    def mask(index):
        def hook(module, args, kwargs):
            visible = torch.ones(len(answer), n + len(answer)).tril(n)
            if windows[index]:
                visible = visible.triu(n - model.config.sliding_window + 1)
            else:
                visible[:, sorted(gone)] = 0
            return args, {**kwargs, "attention_mask": (1 - visible)[None, None] * EVICTED}

        return hook

    for index, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.register_forward_pre_hook(mask(index), with_kwargs=True)
    with torch.inference_mode():
        expected = model(torch.tensor([answer]), **with_cache(model, full)).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("selector", ["full_prefill", "full_reuse", "a3", "mend", "cacheblend"])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_selector_composes_with_every_compression(tiny_engine, name, selector):
    """The first token is the selector's own; a quarter of the bytes stays, give or take a token."""
    engine = tiny_engine()
    prompt = build_prompt(engine, SHAPE)
    plain, first = passed(engine, prompt, selector=selector, compression=name)
    whole = plain.prompt_nbytes
    answer = engine.generate(prompt, selector=selector, compression=name, max_new_tokens=12)
    assert answer.report.fused
    assert answer.report.selector == selector
    assert answer.report.kv_bytes / whole == pytest.approx(0.25, abs=1 / prompt.n_tokens)
    one = engine.generate(prompt, selector=selector, compression=name, max_new_tokens=1)
    assert one.text == engine.runtime.tokenizer.decode([first], skip_special_tokens=True)


def test_settings_that_make_no_sense_are_refused(tiny_engine):
    engine = tiny_engine()
    with pytest.raises(ValueError, match="choose one of"):
        engine.generate("Who?", compression="zip")
    with pytest.raises(ValueError, match="needs a compression"):
        make_compression(None, 0.5)
    for keep in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="share to keep"):
            SnapKV(keep=keep)
    with pytest.raises(ValueError, match="odd"):
        SnapKV(kernel=4)
    with pytest.raises(ValueError, match="drafted"):
        LAQ(lookahead=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_what_is_left_out_frees_its_memory(tiny_engine, architecture):
    """No layer that stays whole holds another layer's block."""
    engine = tiny_engine(architecture)
    _, cache = engine.prepare(
        "Who keeps the lamp?", chunks=["The keeper is Ada. " * 9], selector="full_reuse"
    )
    before = [keys.untyped_storage().data_ptr() for keys, _ in cache.stored()]
    assert len(set(before)) == len(cache.layers)
    cut = [None if layer.is_sliding else torch.arange(4) for layer in cache.layers]
    cache.retain(cut)
    held = {keys.untyped_storage().data_ptr() for keys, _ in cache.stored()}
    for old, slots in zip(before, cut, strict=True):
        assert (old in held) == (slots is None)
