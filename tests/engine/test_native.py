"""The native loops against the same in fp64, and their absence."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from a3_engine.kv import ChunkKV
from a3_engine.model.rotary import rotate_
from a3_engine.native import build
from a3_engine.native import loops as native

DTYPES = (torch.bfloat16, torch.float32)
ROUNDING = {torch.bfloat16: 0.004, torch.float32: 1e-6}
# A sum of two fused products may round to the neighbour.
NEIGHBOUR = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    if native.library(request.param, None) is None:
        pytest.skip("this machine has no such loops")
    return request.param


def reference(query, key, value, sees, scaling, sinks=None):
    """Attention in fp64; ``sees`` is ``(rows, keys)``, ``sinks`` ``(heads,)``."""
    group = query.shape[0] // key.shape[0]
    key, value = (states.double().repeat_interleave(group, 0) for states in (key, value))
    scores = (query.double() @ key.transpose(1, 2) * scaling).masked_fill(~sees, float("-inf"))
    sink = torch.full((len(scores),), float("-inf")) if sinks is None else sinks
    one_more = sink.double()[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, one_more], dim=-1).softmax(-1)[..., :-1] @ value


def buffer(dtype, kv_heads, tokens, head_dim, spare):
    """Keys or values in a cache with room, as a view."""
    return torch.randn(1, kv_heads, tokens + spare, head_dim).to(dtype)[:, :, :tokens]


@pytest.mark.parametrize("sink", [None, -3.0, 8.0, 300.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "head_dim", "tokens"),
    [
        (9, 3, 130, 64, 1100),
        (8, 2, 3, 128, 700),
        (4, 4, 33, 80, 300),
        (4, 1, 1, 96, 130),
        (6, 2, 2, 80, 131),
        (3, 1, 1, 48, 129),
    ],
)
def test_rows_see_what_they_may(dtype, heads, kv_heads, rows, head_dim, tokens, window, sink):
    torch.manual_seed(0)
    query = torch.randn(2, rows, heads, head_dim).to(dtype).transpose(1, 2)
    keys, values = (
        [buffer(dtype, kv_heads, tokens, head_dim, spare) for spare in (0, 7)] for _ in "kv"
    )
    at = torch.randperm(tokens)[:rows].sort().values
    last = at + 1
    first = (last - window).clamp(min=0) if window else torch.zeros_like(last)
    assert native.attends(query, keys, values)
    sinks = None if sink is None else sink + torch.randn(heads).to(dtype)
    output = native.attend(query, keys, values, first[None], last[None], 0.2, sinks=sinks)
    where = torch.arange(tokens)
    sees = (where < last[:, None]) & (where >= first[:, None])
    for place in range(2):
        expected = reference(query[place], keys[place][0], values[place][0], sees, 0.2, sinks)
        got = output[place].transpose(0, 1).double()
        assert (got - expected).norm() <= ROUNDING[dtype] * expected.norm() + 1e-9


@pytest.mark.parametrize("rows", [1, 90])
def test_shared_keys_are_seen_beside_the_own_ones(dtype, rows):
    torch.manual_seed(0)
    query = torch.randn(1, 4, rows, 64).to(dtype)
    key, value = (buffer(dtype, 2, 900, 64, 5) for _ in "kv")
    last = torch.randperm(900)[:rows].sort().values + 1
    first = (last - 50).clamp(min=0)
    shared = torch.randperm(900)[:200].sort().values
    output = native.attend(query, [key], [value], first[None], last[None], 0.125, shared)
    where = torch.arange(900)
    sees = (where < last[:, None]) & ((where >= first[:, None]) | torch.isin(where, shared))
    expected = reference(query[0], key[0], value[0], sees, 0.125)
    got = output[0].transpose(0, 1).double()
    assert (got - expected).norm() <= ROUNDING[dtype] * expected.norm()


def test_large_scores_do_not_overflow(dtype):
    """The highest comes last, so that all sums before it are scaled down."""
    query = torch.full((1, 1, 1, 16), 8.0).to(dtype)
    key = torch.linspace(-8, 8, 400)[None, None, :, None].expand(1, 1, 400, 16).to(dtype)
    value = torch.arange(400.0)[None, None, :, None].expand(1, 1, 400, 16).to(dtype)
    whole = torch.tensor([[0]]), torch.tensor([[400]])
    output = native.attend(query, [key.contiguous()], [value.contiguous()], *whole, 10.0)
    assert torch.equal(output, value[:, :, -1:].transpose(1, 2))


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (40, 20), (64, 8), (128, 32)])
def test_chunks_are_placed_as_by_torch(dtype, head_dim, half, spare):
    torch.manual_seed(0)
    chunks = [
        (start, ChunkKV(*(torch.randn(2, 3, n_tokens, head_dim).to(dtype) for _ in "kv")))
        for start, n_tokens in ((30, 50), (83, 5))
    ]
    room = torch.zeros(4, 3 * 90 * head_dim + spare, dtype=dtype)[:, spare:]  # aligned or not
    cache = list(room.unflatten(1, (3, 90, head_dim)).unflatten(0, (2, 2)).unbind())
    angles = [torch.rand(90, half) * 6 for _ in range(2)]
    tables = [(angle.cos(), angle.sin()) for angle in angles]
    assert native.places(chunks, cache)
    native.place(chunks, cache, tables)
    free = torch.ones(90, dtype=torch.bool)
    for start, kv in chunks:
        part = slice(start, start + kv.n_tokens)
        free[part] = False
        for layer, (keys, values) in enumerate(cache):
            moved = kv.keys[layer].clone()
            rotate_(moved, *(table[part] for table in tables[layer]))
            torch.testing.assert_close(keys[:, part], moved, **NEIGHBOUR[dtype])
            assert torch.equal(values[:, part], kv.values[layer])
    assert not any(states[:, free].any() for layer in cache for states in layer)


@pytest.mark.parametrize("n_probes", [5, 17, 64, 128])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (48, 16), (128, 64)])
def test_others_follow_the_probes(dtype, head_dim, half, n_probes):
    torch.manual_seed(0)
    keys, values, probes, key_moves, value_moves = (
        torch.randn(3, n, head_dim).to(dtype) for n in (101, 101, *3 * [n_probes])
    )
    probes = probes / probes.float().norm(dim=(0, 2), keepdim=True).to(dtype)
    share = torch.rand(101)
    share[7] = 0.0
    angle = torch.rand(101, half) * 6
    table = angle.cos(), angle.sin()
    assert native.shifts(keys, values, probes, table[0])
    got = keys.clone(), values.clone()
    native.shift(*got, share, probes, (key_moves, value_moves), table, 0.1)

    lengths = values.double().norm(dim=(0, 2))
    alike = torch.einsum("htd,hpd->tp", values.double(), probes.double()) / lengths[:, None]
    weights = (alike / 0.1).softmax(-1) * share[:, None]
    for states, moves, after in zip((keys, values), (key_moves, value_moves), got, strict=True):
        expected = torch.einsum("tp,hpd->htd", weights.double(), moves.double())
        if states is keys:
            rotate_(expected, *table, compute=torch.double)
        moved = after.double() - states.double()
        bound = 2 * ROUNDING[dtype] * (states.double().norm() + expected.norm())
        assert (moved - expected).norm() <= bound
        assert torch.equal(after[:, 7], states[:, 7])


def test_other_states_are_left_to_torch(dtype):
    key = torch.randn(1, 2, 10, 16)
    assert not native.attends(key.half(), [key.half()], [key.half()])
    assert not native.attends(key.to(dtype), [key.half()], [key.half()])
    apart = torch.randn(1, 10, 2, 16).to(dtype).transpose(1, 2)  # heads' tokens not side by side
    assert not native.attends(apart, [apart], [apart])
    odd = torch.randn(1, 2, 10, 24).to(dtype)
    assert not native.attends(odd, [odd], [odd])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_no_loops(dtype):
    assert build.made(dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_can_be_switched_off(monkeypatch, dtype):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.made(dtype) is None


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_working_compiler_torch_computes(compiler, tmp_path, monkeypatch, caplog):
    if compiler == "broken":
        (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2; exit 1\n")
        (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "_fits_machine", lambda dtype: True)
    with caplog.at_level(logging.INFO):
        assert build.made(torch.float32) is None
    assert "torch" in caplog.text


@pytest.fixture
def compiler(dtype, tmp_path, monkeypatch):
    """Makes a `g++` that does what a line of shell says, then gives the loops that are there."""
    loops = native.library(dtype, None)._name
    log = tmp_path / "compiled"
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(first: str = "") -> Path:
        (tmp_path / "g++").write_text(
            f'#!/bin/sh\n{first}\n[ "$1" = --version ] && echo 13 && exit\n'
            f'while [ "$1" != -o ]; do shift; done\ncp {loops} "$2"; echo >> {log}\n'
        )
        (tmp_path / "g++").chmod(0o755)
        return log

    return make


@pytest.mark.parametrize("left", [0.0, 0.4, 0.99])
def test_a_library_that_was_cut_is_built_again(dtype, compiler, tmp_path, left):
    """By a power cut or a full disk: loading it would end the process."""
    log = compiler()
    assert build.made(dtype) is not None
    (path,) = (tmp_path / "a3" / "native").glob("*.so")
    # In a new file: this process has the old one loaded, and would die of it at its end.
    cut = path.with_suffix(".cut")
    cut.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    cut.chmod(path.stat().st_mode)
    os.replace(cut, path)
    assert build.made(dtype) is not None
    assert build.made(dtype) is not None
    assert len(log.read_text().splitlines()) == 2


def test_a_compiler_may_speak_in_any_encoding(dtype, compiler):
    compiler("printf '13 \\351\\n'; printf 'Anmerkung \\344\\n' >&2")
    assert build.made(dtype) is not None
    compiler("printf 'Fehler \\344\\n' >&2; exit 1")
    assert build.made(dtype) is None


@pytest.mark.parametrize("when", ["--version", "-std=c++17"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    dtype, compiler, tmp_path, monkeypatch, when
):
    monkeypatch.setattr(build, "ANSWER_S", 1)
    monkeypatch.setattr(build, "TIMEOUT_S", 1)
    started = tmp_path / "started"
    compiler(f'[ "$1" = {when} ] && {{ sleep 600 & echo $! > {started}; wait; }}')
    before = time.monotonic()
    assert build.made(dtype) is None
    assert time.monotonic() - before < 10
    state = Path(f"/proc/{started.read_text().strip()}/stat")

    def ended() -> bool:
        try:
            return state.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    while not ended():  # a signal takes a moment to be delivered
        assert time.monotonic() - before < 10
        time.sleep(0.05)


START = """
import sys, time
from tests.tiny import tiny_model, tiny_tokenizer
from a3_engine import A3Engine
from a3_engine.native import build, loops
build._fits_machine = lambda dtype: True
build.user_cache_path = lambda name: __import__("pathlib").Path(sys.argv[1])
engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=sys.argv[1])
before = time.monotonic()
answer = engine.generate("Who?", chunks=["The lamp of the lighthouse burns."], max_new_tokens=3)
"""


@pytest.mark.parametrize("hangs", ["sleep 600", '[ "$1" = --version ] && echo 13 || sleep 600'])
def test_no_answer_waits_for_a_compiler(tmp_path, hangs):
    """Nor does the end of the program, which leaves nothing behind."""
    script = START + "print(loops.library(engine.runtime.model.dtype), time.monotonic() - before)"
    (tmp_path / "g++").write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/started\n{hangs}\n")
    (tmp_path / "g++").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    loops, seconds = done.stdout.split()
    assert loops == "None"
    assert float(seconds) < 20  # the tiny model, on a busy machine; the compiler sleeps longer
    assert "Traceback" not in done.stderr
    for process in (tmp_path / "started").read_text().split():
        assert not Path(f"/proc/{process}").exists()
    assert list((tmp_path / "cache").glob("native/*")) == []


def test_a_child_forked_while_they_are_compiled_finds_its_own(dtype, monkeypatch):
    going_on, background = threading.Event(), build.Background()
    monkeypatch.setattr(build, "made", lambda dtype: going_on.wait(20) and None)
    monkeypatch.setattr(build, "BACKGROUND", background)
    assert build.library(dtype) is None
    child = os.fork()
    if child == 0:
        try:
            build.made = lambda dtype: "found"
            os._exit(0 if build.library(dtype, 20) == "found" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    going_on.set()


def test_without_a_home_torch_computes(dtype, monkeypatch, caplog):
    """As a container's user without an entry in the list of users."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user that nobody knows")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(54321)
            os._exit(0 if build.made(dtype) is None else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_only_a_library_that_nobody_else_can_write_is_loaded(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    flags = build._flags(dtype)
    path = build._compiled("g++", flags)
    made = path.stat().st_ino
    assert build._compiled("g++", flags) == path
    assert path.stat().st_ino == made
    for open_to_all in (path, path.parent):
        mode = open_to_all.stat().st_mode
        open_to_all.chmod(mode | 0o002)
        with pytest.raises(OSError, match="others"):
            build._compiled("g++", flags)
        open_to_all.chmod(mode)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(OSError, match="others"):
        build._compiled("g++", flags)


def test_other_flags_make_another_library(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    flags = (*build._flags(torch.float32), "-O0")  # the last -O counts, and it compiles fast
    assert build._compiled("g++", flags) != build._compiled("g++", (*flags, "-g"))
