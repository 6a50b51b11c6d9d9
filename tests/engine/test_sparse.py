"""SamKV and FusionRAG against naive second implementations."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from a3_engine import A3Engine
from a3_engine.fusion.selectors import make_selector
from a3_engine.fusion.selectors.samkv import SamKV
from a3_engine.model.attention import has_window
from a3_engine.model.cache_argument import with_cache
from a3_engine.segments import Prompt
from tests.engine.prompts import build_prompt
from tests.engine.turning import PARAGRAPHS, QUESTION, turned
from tests.tiny import CONFIGS, tiny_model

SHAPE = ["prefix", 40, "fresh", 33, 48, "fresh"]
THETA = 10000.0


def spans(prompt: Prompt) -> list[tuple[int, int]]:
    found, at = [], 0
    for segment in prompt.segments:
        if segment.kind == "chunk":
            found.append((at, at + len(segment.ids)))
        at += len(segment.ids)
    return found


def fused(engine: A3Engine, prompt: Prompt, selector):
    _, cache = engine.prepare(prompt, selector=selector)
    with torch.inference_mode():
        logits = engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]), **with_cache(engine.runtime.model, cache)
        ).logits[0, -1]
    return logits, cache


def stored_keys(engine: A3Engine, prompt: Prompt):
    """Every layer's loaded keys and values, before any pass."""
    _, cache = engine.prepare(prompt, selector="full_reuse")
    return [(keys[0], values[0]) for keys, values in cache.stored()]


def unrotated_queries(model, run, last: int) -> list[torch.Tensor]:
    """Each layer's queries of a forward's last rows, before rotation: ``(heads, rows, size)``."""
    found = []

    def hook(module, args, kwargs):
        hidden = kwargs["hidden_states"][0, -last:]
        found.append(module.q_proj(hidden).view(last, 8, 16).transpose(0, 1))

    handles = [
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    return found


def at(query: torch.Tensor, position: int) -> torch.Tensor:
    """``(heads, size)`` without position, rotated."""
    return torch.stack([turned(head, position, THETA) for head in query])


def naive_samkv(engine: A3Engine, prompt: Prompt, method: SamKV) -> set[int]:
    """Positions of the chunk tokens that stay, by the numbered steps of the docstring."""
    model, n = tiny_model("llama"), prompt.n_tokens
    prefix, places = list(engine.runtime.planner.prefix_ids), spans(prompt)
    stable = range(4 - method.stable_layers, 4)
    loaded = stored_keys(engine, prompt)

    local = []
    for start, stop in places:
        ids = torch.tensor([prefix + prompt.ids[start:stop]])
        queries = unrotated_queries(model, lambda ids=ids: model(ids), method.n_local)
        local.append([at(queries[j].mean(1), n - 1) for j in stable])

    ends = [[*range(a, a + method.n_init), *range(b - method.n_local, b)] for a, b in places]
    chunk_tokens = {p for a, b in places for p in range(a, b)}
    fresh = [p for p in range(len(prefix), n) if p not in chunk_tokens]
    # Prefix, ends and fresh tokens, segment by segment, so that each row sees what stands before.
    order = sorted([*range(len(prefix)), *fresh, *(p for e in ends for p in e)])
    cache, queries = DynamicCache(), None
    runs: list[list[int]] = []
    for p in order:
        kind = p in fresh
        if runs and (runs[-1][0] in fresh) == kind and runs[-1][-1] == p - 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    for run in runs:
        if run[0] in fresh:
            arguments = {
                "input_ids": torch.tensor([[prompt.ids[p] for p in run]]),
                "position_ids": torch.tensor([run]),
                **with_cache(model, cache),
            }
            queries = unrotated_queries(model, lambda a=arguments: model(**a), len(run))
        else:
            for index, (keys, values) in enumerate(loaded):
                cache.update(keys[None, :, run], values[None, :, run], index)
    generic = [at(queries[j].mean(1), n - 1) for j in stable]

    scored = []
    for me, (start, stop) in enumerate(places):
        blocks = [
            list(range(b, min(b + method.block, stop - method.n_local)))
            for b in range(start + method.n_init, stop - method.n_local, method.block)
        ]
        shares, above = [], [0.0] * len(blocks)
        for j, layer in enumerate(stable):
            keys = loaded[layer][0]
            personal = generic[j].clone()
            for other in range(len(places)):
                if other != me:
                    for h in range(8):
                        w = abs(
                            float(torch.cosine_similarity(local[other][j][h], generic[j][h], 0))
                        )
                        personal[h] += w * local[other][j][h] / (len(places) - 1)

            def product(mean, personal=personal):
                by_group = [personal[4 * g : 4 * g + 4].mean(0) for g in range(2)]
                return sum(float(by_group[g] @ mean[g]) for g in range(2))

            anchor = product(keys[:, ends[me]].mean(1))
            scores = [product(keys[:, block].mean(1)) for block in blocks]
            spread = (max(scores) - anchor) / (max(scores) - min(scores))
            shares.append(min(max(spread, 0.0), 1.0))
            above = [a + (s - anchor) / len(stable) for a, s in zip(above, scores, strict=True)]
        allowed = int(len(blocks) * sum(shares) / len(shares))
        ranked = sorted(zip(above, blocks, strict=True), key=lambda item: -item[0])
        scored += ranked[:allowed]
    stays = {p for e in ends for p in e}
    room = int(n * method.ratio) - (n - len(chunk_tokens)) - len(stays)
    for _, block in sorted(scored, key=lambda item: -item[0]):
        if room < len(block):
            break
        stays |= set(block)
        room -= len(block)
    return stays


@pytest.mark.parametrize("ratio", [0.4, 0.55, 0.8])
def test_samkv_keeps_what_its_description_keeps(tiny_engine, ratio):
    engine = tiny_engine("llama")
    prompt = build_prompt(engine, SHAPE)
    method = SamKV(ratio, n_init=3, n_local=4, block=5, stable_layers=2)
    _, cache = fused(engine, prompt, method)
    assert set(cache.fusion.selected.tolist()) == naive_samkv(engine, prompt, method)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_samkv_is_a_prefill_of_what_stays(tiny_engine, architecture):
    """Kept tokens are computed over each other alone, at their original positions."""
    engine = tiny_engine(architecture)
    prompt = build_prompt(engine, SHAPE)
    refused = "sliding windows" if any(has_window(engine.runtime.model)) else None
    refused = "layers without" if architecture == "lfm2" else refused
    if refused:
        with pytest.raises(ValueError, match=refused):
            engine.prepare(prompt, selector="samkv", ratio=0.5)
        return
    logits, cache = fused(engine, prompt, SamKV(0.5, n_init=3, n_local=4, block=5))
    kept = cache.positions
    assert 0 < len(kept) <= int(prompt.n_tokens * 0.5)
    ids = torch.tensor([prompt.ids])[:, kept]
    model = tiny_model(architecture)
    past = DynamicCache()
    with torch.inference_mode():
        expected = model(ids, position_ids=kept[None], **with_cache(model, past))
        torch.testing.assert_close(logits, expected.logits[0, -1], atol=1e-3, rtol=0)
        n = prompt.n_tokens
        token = torch.tensor([[7]])
        ours = engine.runtime.model(token, **with_cache(engine.runtime.model, cache)).logits
        theirs = model(token, position_ids=torch.tensor([[n]]), **with_cache(model, past)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_samkv_by_fusion_is_a_mean_of_old_and_new(tiny_engine):
    """At the first layer, whose computed states do not depend on the update."""
    engine = tiny_engine()
    prompt = build_prompt(engine, SHAPE)
    new = fused(engine, prompt, SamKV(0.5))[1]
    mean = fused(engine, prompt, SamKV(0.5, update="fusion"))[1]
    assert torch.equal(new.positions, mean.positions)
    is_chunk = torch.isin(new.positions, new.fusion.selected)
    slots = is_chunk.nonzero()[:, 0].tolist()
    stored = stored_keys(engine, prompt)[0]
    pairs = zip(stored, new.layers[0].stored(), mean.layers[0].stored(), strict=True)
    for old, computed, ours in pairs:
        for slot in slots:
            for head in range(2):
                before = old[head, new.positions[slot]]
                after = computed[0, head, slot]
                share = max(0.0, float(torch.cosine_similarity(before, after, dim=0)))
                expected = (1 - share) * before + share * after
                torch.testing.assert_close(ours[0, head, slot], expected, atol=1e-5, rtol=1e-4)
        # Fresh tokens have nothing stored to be averaged with.
        assert torch.equal(ours[0][:, ~is_chunk], computed[0][:, ~is_chunk])


@pytest.mark.real_model
def test_samkv_decodes_on_a_fifth_of_the_bytes(demo_engine):
    prompt = demo_engine.plan(QUESTION, [" ".join(PARAGRAPHS)] * 4)
    whole = demo_engine.generate(prompt, selector="full_reuse", max_new_tokens=4).report
    sparse = demo_engine.generate(prompt, selector="samkv", max_new_tokens=4).report
    assert sparse.fused
    assert sparse.kv_bytes <= 0.2 * whole.kv_bytes


def test_fusion_rag_asks_with_a_question_that_saw_no_chunk(tiny_engine):
    engine = tiny_engine("llama")
    prompt = build_prompt(engine, SHAPE)
    n, prefix = prompt.n_tokens, list(engine.runtime.planner.prefix_ids)
    chunk_tokens = [p for a, b in spans(prompt) for p in range(a, b)]
    rest = [p for p in range(n) if p not in chunk_tokens]
    assert rest[: len(prefix)] == list(range(len(prefix)))
    model, n_question = tiny_model("llama"), len(prompt.segments[-1].ids)
    ids = torch.tensor([[prompt.ids[p] for p in rest]])
    cache = DynamicCache()
    queries = unrotated_queries(
        model,
        lambda: model(ids, position_ids=torch.tensor([rest]), **with_cache(model, cache)),
        n_question,
    )[-1]
    keys = stored_keys(engine, prompt)[-1][0].clone()
    keys[:, rest] = cache.layers[-1].keys[0]
    sums = [0.0] * n
    for row in range(n_question):
        position = n - n_question + row
        for head in range(8):
            query = turned(queries[head, row], position, THETA)
            weights = torch.softmax(keys[head // 4, : position + 1] @ query / 4.0, dim=0)
            for p in range(position + 1):
                sums[p] += float(weights[p])
    budget = int(len(chunk_tokens) * 0.3)
    expected = sorted(sorted(chunk_tokens, key=lambda p: -sums[p])[:budget])
    _, cache = engine.prepare(prompt, selector=make_selector("fusion_rag", 0.3))
    assert cache.fusion.selected.tolist() == expected
