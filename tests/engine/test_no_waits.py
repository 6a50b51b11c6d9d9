"""A request on a GPU: from the loaded chunks to the last layer the host never waits for it.

Tensors that have a device and a shape but no values stand for those of a GPU. Whatever would have
to bring a value to the host raises, and so does an operation on tensors of two devices.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from a3_engine import native
from a3_engine.fusion import arrival, correction
from a3_engine.fusion.loading import allocate, load_chunks
from a3_engine.fusion.selectors import SELECTORS
from a3_engine.fusion.selectors.base import Run
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout, Span
from a3_engine.model.attention import install
from a3_engine.model.hooks import install_hooks, run_pass
from a3_engine.model.kv_shape import kv_shape
from a3_engine.model.rotary import read_rotation
from tests.tiny import tiny_model

_setup_privateuseone_for_python_backend("waitless")  # a device that no build of torch has to have
GPU = torch.device("waitless", 0)
TOKENS = 90


class NothingComesBack(TorchDispatchMode):
    """Raises where a tensor is copied from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and to == torch.device("cpu"):
            assert args[0].device != GPU
        return func(*args, **(kwargs or {}))


class Shapes:
    """What the kernels give, in shape; their launches follow from shapes alone."""

    @staticmethod
    def attend(query, keys, values, first, last, scaling, shared=None, softcap=None, table=None):
        assert {query.device, first.device, last.device, keys[0].device} == {GPU}
        assert shared is None or shared.device == GPU
        return query.transpose(1, 2).contiguous()

    @staticmethod
    def placer(chunks, layers, tables):
        assert {one.device for pair in [*layers, *tables] for one in pair} == {GPU}
        return lambda some: None

    @staticmethod
    def shift(keys, values, span, share, rows, probes, count, fresh, table, temperature):
        devices = {one.device for one in (keys, values, share, rows, probes, count, *fresh, *table)}
        assert devices == {GPU}


@pytest.fixture
def shapes(monkeypatch):
    for module in (native, arrival, correction):
        monkeypatch.setattr(module, "kernels_on", lambda device: Shapes)


def layout(mode):
    fresh = torch.cat([torch.arange(4), torch.arange(40, 42), torch.arange(80, TOKENS)])
    question = torch.cat([torch.arange(2, 4), torch.arange(82, TOKENS)])
    made = Layout(TOKENS, (Span(4, 40, exact=20), Span(42, 80)), 4, fresh, question)
    # What is asked of it on the CPU was asked before; here too it has shapes alone.
    known = {name: getattr(made, name) for name in Layout.SENT}
    shape = replace(made, fresh=mode.from_tensor(fresh), question=mode.from_tensor(question))
    shape.__dict__.update({name: mode.from_tensor(one) for name, one in known.items()})
    shape.__dict__["question_start"] = made.question_start
    return shape


def request(model, selector):
    decoder = model.get_decoder()
    rotation = read_rotation(decoder)
    states = kv_shape(decoder).of_chunk(36)[0]  # which the gate has asked for by then
    mode = FakeTensorMode()
    where = layout(mode)
    positions = [span.start for span in where.chunks]
    with mode, NothingComesBack(), torch.inference_mode():
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, one in own.items():
                    if one is not None:
                        own[name] = torch.empty(one.shape, dtype=one.dtype, device=GPU)
        cache = allocate(model, TOKENS, TOKENS + 8)
        chunks = [(start, ChunkKV(*torch.empty(2, *states, device=GPU))) for start in positions]
        # Cosines and sines are made once for all shorter prompts.
        table = torch.empty(128, len(rotation.inv_freq[0]), device=GPU)
        rotation._last[:] = [[(table, table)] * len(cache.layers)]
        load_chunks(cache, rotation, chunks)
        cache = selector.prepare(Run(model, rotation, cache, where, range(TOKENS), room=8)).cache
        cache.fusion.last_token_only = True
        run_pass(decoder, [range(TOKENS)], cache)
    return cache


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", ["mend", "question_attention", "epic", "full_reuse"])
def test_the_host_never_waits(shapes, architecture, name, ratio):
    model = tiny_model(architecture)
    install(model)
    install_hooks(model)
    options = {"long_tokens": 1} if name == "mend" else {}
    selector = SELECTORS[name](**options)
    cache = request(model, selector if name == "full_reuse" else replace(selector, ratio=ratio))
    assert cache.fusion.rows.device == GPU


@pytest.mark.parametrize(
    "wait",
    [
        lambda states: int(states.sum()),
        lambda states: states.nonzero(),
        lambda states: states[states > 0],
        lambda states: states.cpu(),
        lambda states: states + torch.ones(2, 2),
    ],
)
def test_a_wait_would_be_seen(wait):
    with FakeTensorMode(), NothingComesBack():
        states = torch.ones(2, 2, device=GPU)
        with pytest.raises((AssertionError, RuntimeError, DataDependentOutputException)):
            wait(states)
