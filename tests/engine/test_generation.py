"""Answers: the same however they are asked for, ended as asked, stopped when nobody waits."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from a3_engine import A3Engine, Chunk, ContextOverflowError, Message
from tests.engine.conftest import NEVER
from tests.texts import ASK, LAMP, SHORE


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "a3-generate"]


def soon(condition, seconds: float = 20.0) -> bool:
    """Whether it comes true before an endless answer could be finished."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def own_greedy(engine: A3Engine, ids: list[int], n: int) -> list[int]:
    """transformers' own greedy answer to these ids."""
    output = engine.runtime.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=n, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("stop", [(), ("e", "t")])
async def test_every_way_of_asking_gives_the_same_answer(endless, stop):
    options = {"chunks": [LAMP, SHORE], "ratio": 0.5, "max_new_tokens": 60, "stop": stop}
    answer = endless.generate(ASK, **options)
    stream = endless.stream(ASK, **options)
    assert "".join(stream) == answer.text
    assert list(stream) == []
    astream = await endless.astream(ASK, **options)
    assert "".join([piece async for piece in astream]) == answer.text
    assert (await endless.agenerate(ASK, **options)).text == answer.text == str(answer)
    for report in (stream.report, astream.report):
        assert report.generated_tokens == answer.report.generated_tokens
        assert report.finish_reason == answer.report.finish_reason == ("stop" if stop else "length")


def test_ordinary_prefill_gives_transformers_own_answer(endless):
    """Without known chunks, and where full prefill is asked for."""
    for chunks, selector in (([], "a3"), ([LAMP], "full_prefill")):
        prompt = endless.plan(ASK, chunks)
        expected = own_greedy(endless, prompt.ids, 40)
        answer = endless.generate(prompt, selector=selector, max_new_tokens=40)
        assert answer.text == endless.runtime.tokenizer.decode(expected, skip_special_tokens=True)
        assert not answer.report.fused


def test_the_answer_ends_at_the_end_token(endless):
    prompt = endless.plan(ASK)
    tokens = own_greedy(endless, prompt.ids, 40)
    end = tokens[20]
    length = tokens.index(end) + 1
    for ends in (end, [NEVER, end]):
        endless.runtime.model.generation_config.eos_token_id = ends
        report = endless.generate(prompt, max_new_tokens=40).report
        assert (report.finish_reason, report.generated_tokens) == ("stop", length)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_the_answer_has_at_most_the_tokens_asked_for(endless, n):
    report = endless.generate(ASK, chunks=[LAMP], max_new_tokens=n).report
    assert (report.finish_reason, report.generated_tokens) == ("length", n)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_stop_strings_end_the_answer(endless, width):
    """The text ends before the first of them, and no piece ever shows a part of it."""
    whole = endless.generate(ASK, chunks=[LAMP], max_new_tokens=80).text
    stop = whole[30 : 30 + width]
    stream = endless.stream(ASK, chunks=[LAMP], max_new_tokens=80, stop=(stop, "never"))
    pieces = list(stream)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert stream.report.finish_reason == "stop"
    assert stream.report.generated_tokens < 80


async def test_what_does_not_fit_is_refused_and_not_cut(tiny_engine):
    """All the numbers are named, and nothing is computed or stored; what just fits is answered."""
    engine = tiny_engine()
    prompt = engine.plan(ASK, [LAMP] * 3)
    room = 512 - prompt.n_tokens
    for ask in (engine.generate, engine.stream):
        with pytest.raises(ContextOverflowError) as overflow:
            ask(prompt, max_new_tokens=room + 7)
        for number in (prompt.n_tokens, room + 7, 7, 512):
            assert f" {number}" in str(overflow.value)
    with pytest.raises(ContextOverflowError):
        await engine.agenerate(prompt, max_new_tokens=room + 1)
    with pytest.raises(ContextOverflowError, match="512"):
        engine.precompute([SHORE, LAMP * 30], progress=False)
    assert engine.stats().entries == 0
    assert engine.generate(prompt, max_new_tokens=room).report.generated_tokens <= room
    assert engine.stats().entries == 2


async def test_the_event_loop_goes_on_while_answers_are_computed(endless):
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    asks = [endless.agenerate(f"{ASK} {n}", chunks=[LAMP], max_new_tokens=200) for n in range(4)]
    answers = await asyncio.gather(*asks)
    ticker.cancel()
    assert [answer.report.generated_tokens for answer in answers] == [200] * 4
    assert ticks > 20


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_an_abandoned_stream_stops_computing(endless, how):
    """Closed, left, or dropped; the next request need not wait for it."""
    stream = endless.stream(ASK, chunks=[LAMP], max_new_tokens=30_000)
    next(stream)
    assert len(workers()) == 1
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            next(stream)
    else:
        del stream
        gc.collect()
    assert soon(lambda: not workers())
    if how != "drop":
        assert len(list(stream)) < 20_000
        assert stream.report.finish_reason == "abandoned"
    assert endless.generate(ASK, chunks=[LAMP], max_new_tokens=5).report.generated_tokens == 5


@pytest.mark.parametrize("how", ["cancel", "timeout", "close", "break"])
async def test_an_abandoned_request_of_an_event_loop_stops_computing(endless, how):
    options = {"chunks": [LAMP], "max_new_tokens": 30_000}
    if how in ("cancel", "timeout"):
        task = asyncio.create_task(endless.agenerate(ASK, **options))
        await asyncio.sleep(0.3)
        assert len(workers()) == 1
        if how == "cancel":
            task.cancel()
        with pytest.raises((asyncio.CancelledError, TimeoutError)):
            await asyncio.wait_for(task, 0.1)
    else:
        stream = await endless.astream(ASK, **options)
        async for _ in stream:
            break
        if how == "close":
            await stream.aclose()
        else:
            del stream
            gc.collect()
    assert await asyncio.to_thread(soon, lambda: not workers())
    assert (await endless.agenerate(ASK, max_new_tokens=5)).report.generated_tokens == 5


def test_threads_get_the_answers_of_one_after_the_other(endless):
    """Eight at once, some with the same chunks, some with none, hits and misses mixed."""
    requests = [
        [
            Message(
                "user", [Chunk(LAMP), Chunk(f"{SHORE} No. {n // 2}"), f"{ASK} {n * 7} or {n * n}?"]
            )
        ]
        if n % 4
        else f"{ASK} {n * 7} or {n * n}?"
        for n in range(12)
    ]

    def ask(request) -> str:
        return endless.generate(request, ratio=0.3, max_new_tokens=30).text

    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(ask, requests))
    assert at_once == [ask(request) for request in requests]
    assert len(set(at_once)) == 12
