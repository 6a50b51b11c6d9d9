"""The Triton kernels, in Triton's interpreter on the CPU, beside torch in fp64.

The interpreter knows no products of bf16, so fp16 stands for half precision here.
"""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from a3_engine import A3Engine
from a3_engine.decoding import graphs
from a3_engine.fusion.cache import FusedLayer
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout, Span
from a3_engine.model.rotary import Rotation, rotate_
from tests.engine.prompts import build_prompt
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer

pytest.importorskip("triton", reason="Triton has no build for this machine")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels on the CPU; without it, the same engine computes by C++ or torch."""
    monkeypatch.setenv("A3_NATIVE", "interpreted")
    return monkeypatch


@pytest.fixture(params=ROUNDING, ids=str)
def dtype(request):
    return request.param


def kernels():
    return importlib.import_module("a3_engine.native.kernels")


def expected_attention(query, keys, values, sees, scaling, softcap=None):
    """fp64; ``sees`` is ``(sequences, rows, its keys)``."""
    outputs = []
    for one, key, value, seen in zip(query, keys, values, sees, strict=True):
        group = len(one) // key.shape[1]
        key, value = (states[0].double().repeat_interleave(group, 0) for states in (key, value))
        scores = one.double() @ key.transpose(1, 2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.stack(outputs)


def states(dtype, heads, tokens, head_dim, spare=5):
    """Keys or values in a cache with room, as a view."""
    return torch.randn(1, heads, tokens + spare, head_dim).to(dtype)[:, :, :tokens]


def assert_close(ours, reference, dtype):
    assert ours.isfinite().all()
    assert (ours.double() - reference).norm() <= ROUNDING[dtype] * reference.norm()


@pytest.mark.parametrize("kind", ["all", "window", "softcap", "near"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "head_dim"),
    [(8, 2, 5, 16), (9, 3, 70, 64), (6, 6, 40, 24), (4, 1, 3, 8)],
)
def test_rows_see_what_they_may(dtype, heads, kv_heads, rows, head_dim, kind):
    torch.manual_seed(0)
    tokens = 600
    query = torch.randn(1, heads, rows, head_dim).to(dtype)
    key, value = (states(dtype, kv_heads, tokens, head_dim) for _ in "kv")
    at = torch.cat([torch.randperm(tokens - 1)[: rows - 1], torch.tensor([tokens - 1])]).sort()[0]
    first, last = torch.zeros_like(at), at + 1
    shared, softcap, where = None, None, torch.arange(tokens)
    if kind in ("window", "near"):
        first = (at - 30).clamp(min=0)
    sees = (where >= first[:, None]) & (where < last[:, None])
    if kind == "near":
        some = torch.randperm(tokens)[:90].sort()[0]
        sees |= torch.isin(where, some) & (where < first[:, None])
        shared = torch.cat([some, torch.full((3,), tokens)])  # what lies beyond is seen by nobody
    if kind == "softcap":
        softcap = 2.0
    got = kernels().attend(query, [key], [value], first[None], last[None], 0.3, shared, softcap)
    expected = expected_attention(query, [key], [value], sees[None], 0.3, softcap)
    assert_close(got, expected, dtype)


def test_each_sequence_has_its_own_keys(dtype):
    torch.manual_seed(0)
    lengths = (30, 300, 477)
    keys, values = ([states(dtype, 2, n, 32) for n in lengths] for _ in "kv")
    query = torch.randn(3, 8, 1, 32).to(dtype)
    last = torch.tensor(lengths)[:, None]
    first = (last - 200).clamp(min=0)
    got = kernels().attend(query, keys, values, first, last, 0.2)
    for place, n in enumerate(lengths):
        sees = (torch.arange(n) >= first[place])[None, None]
        one = [x[place : place + 1] for x in (query, keys, values)]
        assert_close(got[place : place + 1], expected_attention(*one, sees, 0.2), dtype)


@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (24, 6)])
def test_placing_copies_and_turns(dtype, head_dim, half):
    torch.manual_seed(0)
    layers, kv_heads, room = 3, 2, 90
    chunks = [
        (start, ChunkKV(*torch.randn(2, layers, kv_heads, tokens, head_dim).to(dtype)))
        for start, tokens in ((5, 40), (50, 7))
    ]
    cache = [tuple(torch.zeros(2, 2, kv_heads, room, head_dim).to(dtype)) for _ in range(layers)]
    rotation = Rotation(torch.rand(layers, half))
    tables = rotation.tables(torch.arange(room))
    place = kernels().placer(chunks, cache, tables)
    place(slice(0, 2))
    assert not cache[2][0].any()
    place(slice(2, 3))
    for (keys, values), (cos, sin), layer in zip(cache, tables, range(layers), strict=True):
        for start, kv in chunks:
            span = slice(start, start + kv.n_tokens)
            turned = kv.keys[layer].clone()
            rotate_(turned, cos[span], sin[span])
            for prompt in range(2):
                assert torch.equal(values[prompt, :, span], kv.values[layer])
                torch.testing.assert_close(keys[prompt, :, span], turned, rtol=2e-3, atol=2e-3)
        assert not keys[:, :, 47:50].any()
        assert not values[:, :, :5].any()


@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (24, 6)])
@pytest.mark.parametrize("picked", [90, 20, 0])
def test_repair_moves_as_torch_does(dtype, head_dim, half, picked, interpreted):
    torch.manual_seed(0)
    tokens, fresh = 200, torch.cat([torch.arange(5), torch.arange(190, 200)])
    spans = (Span(5, 70, exact=65), Span(70, 190))
    layout = Layout(tokens, spans, 5, fresh, fresh[-3:])
    rotation = Rotation(torch.rand(1, half))
    rows = torch.cat([torch.randperm(185)[:picked] + 5, fresh]).sort()[0]
    keys, values = (torch.randn(1, 2, tokens + 8, head_dim).to(dtype) for _ in "kv")
    new = [torch.randn(1, 2, len(rows), head_dim).to(dtype) for _ in "kv"]

    def repaired():
        layer = FusedLayer(keys.clone(), values.clone(), tokens)
        drift = Corrector(KVCorrection(), layout, rotation, [torch.device("cpu")])
        drift.apply(0, layer, rows, *new)
        return layer.stored()

    ours = repaired()
    interpreted.setenv("A3_NATIVE", "0")
    for got, expected, before in zip(ours, repaired(), (keys, values), strict=True):
        assert_close(got, expected.double(), dtype)
        assert torch.equal(got[:, :, :70], before[:, :, :70])
        assert picked == 0 or not torch.equal(got, before[:, :, :tokens])


@pytest.fixture
def engine_of(tmp_path):
    """Engines around a tiny model, closed at the end."""
    made = []

    def make(name):
        folder = tmp_path / str(len(made))
        made.append(
            A3Engine.from_pretrained(
                tiny_model(name), tiny_tokenizer(), cache_dir=folder, stand_in=STAND_IN
            )
        )
        assert made[-1].unsupported_reason is None
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_answers_are_those_of_torch(engine_of, name, interpreted):
    """Each method's choice of tokens, and log probabilities of an answer that is decoded."""
    ours = engine_of(name)
    interpreted.setenv("A3_NATIVE", "0")
    reference = engine_of(name)
    prompt = build_prompt(reference, ["prefix", 20, "fresh", 17, "fresh"])
    for method, ratio, tokens in (("mend", 0.3, 1), ("a3", 0.3, 1), ("full_reuse", 0, 3)):
        options = {"selector": method, "ratio": ratio, "max_new_tokens": tokens, "logprobs": 2}
        interpreted.setenv("A3_NATIVE", "interpreted")
        got = ours.generate(prompt, **options).report
        interpreted.setenv("A3_NATIVE", "0")
        expected = reference.generate(prompt, **options).report
        assert got.trace.recomputed == expected.trace.recomputed
        for one, other in zip(got.logprobs, expected.logprobs, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_steps_by_addresses_are_those_of_the_caches(engine_of, monkeypatch):
    """Requests of several lengths come and go; each answers as it does alone."""
    monkeypatch.setattr(graphs, "SIZES", (1, 2, 4))
    engine = engine_of("llama")
    prompts = [build_prompt(engine, ["prefix", 12 + 3 * at, "fresh"]) for at in range(3)]

    def ask(at):
        return str(engine.generate(prompts[at], selector="full_reuse", max_new_tokens=2 + at))

    alone = [ask(at) for at in range(3)]
    engine.runtime.prefix_cache.clear()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == alone
    assert engine.runtime.decoder._graphs._captured
    assert set(engine.runtime.decoder._graphs._captured) <= {1, 2, 4}


COMPILE = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BF16, F32, I64 = "*bf16", "*fp32", "*i64"
attention, placing, shifting = (
    importlib.import_module(f"a3_engine.native.kernels.{name}")
    for name in ("attention", "placing", "shifting")
)
attend = {"TABLED": False, "SHARED": True, "SINKS": True, "CAPPED": False, "SPLIT": False}
tile = {"PRECISION": "tf32", "G": 4, "M": 128, "N": 64, "D": 128, "DP": 128}
halves = {"HALF": 64, "HP": 64, "D": 128, "DP": 128}
for kernel, types, constants in (
    (attention._attend, [BF16] * 3 + [I64] * 5 + [BF16] * 2 + [F32] * 3, attend | tile),
    (attention._join, [BF16, F32, F32, F32], {"D": 128, "DP": 128, "PARTS": 64}),
    (placing._place, [I64] * 3, {"DTYPE": triton.language.bfloat16, "T": 32} | halves),
    (placing._append, [BF16, BF16, I64, I64], {"D": 128, "DP": 128}),
    (shifting._moves, [BF16] * 4 + [I64] * 2 + [F32] * 2 + [BF16] * 3, {"H": 8} | halves),
    (
        shifting._shift,
        [BF16, BF16, F32, BF16, BF16, BF16, I64, F32, F32],
        {"PRECISION": "tf32", "T": 64, "P": 64} | halves,
    ),
):
    names, left = kernel.arg_names, iter(types)
    floats = ("scale", "cap", "sharpness")
    signature = {
        name: "constexpr" if name in constants else next(left, "fp32" if name in floats else "i32")
        for name in names
    }
    where = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=where)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print(kernel.__name__)
"""


def test_they_compile_for_an_h100():
    """Without a GPU, by a process in which Triton compiles instead of interpreting."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_attend", "_join", "_place", "_append", "_moves", "_shift"]
