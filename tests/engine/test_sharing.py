"""Requests that decode together: each gets what it would have got alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from a3_engine.decoding import graphs
from a3_engine.model.batch_cache import step
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.kv_shape import ordinary_cache
from tests.texts import LAMP, SHORE
from tests.tiny import CONFIGS, VOCABULARY


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_step_of_several_caches_is_a_step_of_each(tiny_engine, architecture):
    """Whatever their lengths, which may lie within and beyond a sliding window."""
    model = tiny_engine(architecture).runtime.model
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, VOCABULARY, (1, n), generator=generator) for n in (5, 17, 31)]
    with torch.inference_mode():
        caches = [ordinary_cache(model.get_decoder()) for _ in prompts]
        for ids, cache in zip(prompts, caches, strict=True):
            model(input_ids=ids[:, :-2], **with_cache(model, cache))
        for place in (-2, -1):
            tokens = [int(ids[0, place]) for ids in prompts]
            logits = step(model, tokens, caches, model.device)
            for ids, ours in zip(prompts, logits, strict=True):
                seen = ids[:, : ids.shape[1] + place + 1]
                torch.testing.assert_close(
                    ours[-1], model(input_ids=seen).logits[0, -1], rtol=1e-3, atol=1e-3
                )
    assert [cache.get_seq_length() for cache in caches] == [5, 17, 31]


def ask_all(engine, requests, sampling):
    """Answers of requests that are all there at once."""
    start = threading.Barrier(len(requests))

    def ask(place: int) -> str:
        start.wait()
        return engine.generate(requests[place], chunks=[LAMP, SHORE], **sampling[place]).text

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, range(len(requests))))


@pytest.fixture
def counted(endless, monkeypatch):
    """The engine, and how many requests took part in each of its steps."""
    sizes = []

    def counting(model, tokens, *rest):
        sizes.append(len(tokens))
        return step(model, tokens, *rest)

    monkeypatch.setattr(graphs, "step", counting)
    return endless, sizes


def test_requests_at_once_share_steps_and_answer_as_alone(counted):
    """Fused and plain, compressed, of different lengths."""
    engine, sizes = counted
    engine.precompute([LAMP, SHORE], progress=False)
    requests = [f"Who keeps lamp {n}?" for n in range(6)]
    sampling = [{"max_new_tokens": 40 + 10 * n} for n in range(6)]
    sampling[1]["selector"] = "full_prefill"
    sampling[2] |= {"compression": "snapkv", "keep": 0.5}
    alone = [
        engine.generate(request, chunks=[LAMP, SHORE], **options).text
        for request, options in zip(requests, sampling, strict=True)
    ]
    n_steps = sum(sizes)
    assert set(sizes) == {1}
    sizes.clear()
    assert ask_all(engine, requests, sampling) == alone
    assert sum(sizes) == n_steps
    assert max(sizes) > 1
    assert len(sizes) < n_steps


def test_a_request_that_is_dropped_leaves_the_others_alone(counted):
    engine, sizes = counted
    alone = engine.generate("Who keeps the lamp?", max_new_tokens=200).text
    dropped = engine.stream("What is on the shore?", max_new_tokens=2000)
    next(dropped)
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(engine.generate, "Who keeps the lamp?", max_new_tokens=200)
        while max(sizes) < 2:
            assert not kept.done(), "the two never met"
        dropped.close()
        assert kept.result().text == alone


def test_an_error_in_a_shared_step_reaches_every_request(endless, monkeypatch):
    def failing(model, tokens, *rest):
        if len(tokens) == 2:
            raise RuntimeError("the device is gone")
        return step(model, tokens, *rest)

    monkeypatch.setattr(graphs, "step", failing)
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(endless.generate, f"Lamp {n}?", max_new_tokens=2000) for n in range(2)
        ]
        for answer in answers:
            with pytest.raises(RuntimeError, match="the device is gone"):
                answer.result()
    assert endless.generate("Lamp?", max_new_tokens=4).report.generated_tokens == 4


def test_an_error_in_one_choice_is_its_own(counted):
    """Its reader breaks, say: the other request goes on."""
    engine, sizes = counted
    alone = engine.generate("Who keeps the lamp?", max_new_tokens=300).text

    def broken(piece: str) -> None:
        if max(sizes) > 1:
            raise ValueError("a reader that breaks")

    sizes.clear()
    sizes.append(0)
    with ThreadPoolExecutor(2) as pool:
        kept = pool.submit(engine.generate, "Who keeps the lamp?", max_new_tokens=300)
        work = engine._work("What is on the shore?", max_new_tokens=2000)
        with pytest.raises(ValueError, match="a reader that breaks"):
            pool.submit(work, broken, lambda: False).result()
        assert kept.result().text == alone


def test_an_interrupted_request_is_stepped_no_more(counted, monkeypatch):
    """Its thread is gone; those that come later decode without it."""
    engine, sizes = counted
    shared = engine.runtime.decoder
    run = shared.executor.run

    def interrupted(work, **options):
        if work == shared._step:
            raise KeyboardInterrupt
        return run(work, **options)

    monkeypatch.setattr(shared.executor, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("What is on the shore?", max_new_tokens=2000)
    monkeypatch.setattr(shared.executor, "run", run)
    engine.generate("Who keeps the lamp?", max_new_tokens=20)
    assert set(sizes) == {1}
