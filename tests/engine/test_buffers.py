"""Memory of one cache serves the next, and never two at once."""

import gc

import torch

from a3_engine.model.buffers import ALIGNMENT, Buffers


def test_what_is_given_back_is_lent_again():
    buffers = Buffers()
    first = buffers.take(1000, torch.bfloat16)
    assert first.shape == (1000,)
    assert first.data_ptr() % ALIGNMENT == 0
    at = first.data_ptr()
    del first
    smaller = buffers.take(900, torch.bfloat16)
    assert smaller.data_ptr() == at


def test_little_is_not_lent_much():
    buffers = Buffers()
    large = buffers.take(10_000, torch.uint8)
    at = large.data_ptr()
    del large
    small = buffers.take(100, torch.uint8)
    assert small.data_ptr() != at
    assert buffers.take(9000, torch.uint8).data_ptr() == at


def test_what_is_larger_than_allowed_drives_nothing_out():
    buffers = Buffers(limit=1000)
    large, small = buffers.take(2000, torch.uint8), buffers.take(500, torch.uint8)
    at = small.data_ptr()
    del small, large
    assert buffers.take(500, torch.uint8).data_ptr() == at


def test_memory_is_in_use_as_long_as_any_view_of_it_is():
    buffers = Buffers()
    first = buffers.take(100, torch.float32)
    view, at = first.view(10, 10)[3, 2:], first.data_ptr()
    view.fill_(7.0)
    del first
    gc.collect()
    second = buffers.take(100, torch.float32)
    assert second.data_ptr() != at
    second.zero_()
    assert (view == 7.0).all()
    del view
    assert buffers.take(100, torch.float32).data_ptr() == at


def test_no_more_is_kept_than_allowed():
    buffers = Buffers(limit=1000)
    large, small = buffers.take(2000, torch.uint8), buffers.take(500, torch.uint8)
    at = small.data_ptr()
    del large, small
    assert buffers._kept == 500
    assert buffers.take(500, torch.uint8).data_ptr() == at


def test_memory_may_come_back_in_the_middle_of_anything():
    """Python's collector runs wherever something is made, also while memory is taken."""

    class Circle:
        pass

    before, met = gc.get_threshold(), []
    gc.freeze()  # what else lives in this process is not looked through again and again
    try:
        for step in range(1, 60):
            buffers = Buffers(limit=200_000)
            for size in (1000, 3000):
                buffers.take(size, torch.uint8)
            gc.collect()
            circle = Circle()
            circle.itself, circle.memory = circle, buffers.take(50_000, torch.uint8)
            at = circle.memory.data_ptr()
            del circle
            reserve = [[] for _ in range(500)]  # lists that Python had at hand
            gc.set_threshold(gc.get_count()[0] + step, 1000, 1000)
            buffers.take(400_000, torch.uint8)
            gc.set_threshold(*before)
            del reserve
            met.append(50_000 in buffers._free)
            gc.collect()
            assert buffers.take(50_000, torch.uint8).data_ptr() == at
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    assert any(met)


def test_a_finished_request_leaves_its_memory_at_once(tiny_engine, monkeypatch):
    """Without waiting for Python's collector: nothing holds the cache in a circle."""
    buffers, engine = Buffers(), tiny_engine("llama")
    monkeypatch.setattr(engine.runtime.executor, "buffers", buffers)
    chunks = ["The lamp burns through the night.", "The keeper is called Ada."]
    for selector in ("mend", "a3", "full_reuse"):

        def ask(selector=selector):
            engine.generate("Who keeps it?", chunks=chunks, selector=selector, max_new_tokens=2)
            engine.runtime.prefix_cache.clear()

        ask()
        gc.collect()
        buffers.clear()
        gc.disable()
        try:
            ask()
            kept = sum(map(len, buffers._free.values()))
            assert kept == engine.runtime.model.config.num_hidden_layers
        finally:
            gc.enable()
