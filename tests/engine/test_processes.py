"""Forks, the end of a program, and what the caller's thread does to torch."""

from __future__ import annotations

import faulthandler
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import a3_engine
from a3_engine.processes import Lock, cached_property, make_anew_in_child
from tests.texts import ASK, LAMP, SHORE
from tests.tiny import LONG

START = """
import os, signal, sys, threading, time
from pathlib import Path
from a3_engine import A3Engine
from tests.tiny import LONG
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer
engine = A3Engine.from_pretrained(
    tiny_model(LONG), tiny_tokenizer(), cache_dir=sys.argv[1], stand_in=STAND_IN
)
ask = {"chunks": ["The lamp of the lighthouse burns through the night."], "max_new_tokens": 6}
expected = engine.generate("Who?", **ask).text
engine.runtime.model.generation_config.eos_token_id = 10_000
"""


def run(script: str, folder: Path) -> str:
    """What a program prints; it has to end by itself, and well."""
    done = subprocess.run(
        [sys.executable, "-c", START + script, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_answers(tmp_path):
    """Behind a stream, and while another thread of the parent is answering and storing."""
    script = """
assert "".join(engine.stream("Who?", **ask))
busy = threading.Event()
def keep_busy():
    for number in range(10_000):
        engine.generate("Who?", chunks=[f"{number}. {ask['chunks'][0]}"], max_new_tokens=4)
        busy.set()
threading.Thread(target=keep_busy, daemon=True).start()
busy.wait()
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = engine.generate("Who?", **ask).text.startswith(expected[:3])
        good = good and "".join(engine.stream("Who?", **ask)) != ""
        good = good and engine.precompute([f"{number} of the children. " * 3], progress=False)
        good = good and engine.evict("nothing") == 0
        os._exit(0 if good else 1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children], flush=True)
os._exit(0)
"""
    assert run(script, tmp_path).strip() == "[0, 0, 0, 0]"


def test_what_goes_while_a_child_begins_hides_no_lock():
    """Garbage of the parent may be collected at that moment."""

    class Holder:
        def __init__(self):
            self.held = [Lock() for _ in range(3)]
            make_anew_in_child(self.go)

        def go(self):
            self.held = []

    holder = Holder()
    locks = [Lock() for _ in range(4)]
    for lock in locks:
        lock.acquire()
    child = os.fork()
    if child == 0:
        os._exit(sum(not lock.acquire(blocking=False) for lock in locks))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(holder.held) == 3


def test_a_property_that_a_thread_computes_is_free_in_a_child():
    """Python 3.11's cached properties hold one for all objects of a class."""

    class Slow:
        @cached_property
        def value(self) -> int:
            inside.set()
            may_end.wait(60)
            return 5

    inside, may_end = threading.Event(), threading.Event()
    slow, other = Slow(), Slow()
    thread = threading.Thread(target=lambda: slow.value)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        may_end.set()
        os._exit(0 if other.value == 5 else 2)
    may_end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (slow.value, slow.__dict__) == (5, {"value": 5})
    for file in Path(a3_engine.__file__).parent.rglob("*.py"):
        assert "from functools import cached_property" not in file.read_text(), file


def test_a_thread_of_the_program_finishes_its_answer(tmp_path):
    """Though the main thread has ended before."""
    script = """
def answer():
    time.sleep(0.5)
    print(len(engine.generate("Who?", max_new_tokens=300).text) > 20)
    print("".join(engine.stream("Who?", max_new_tokens=5)) != "")
threading.Thread(target=answer).start()
"""
    assert run(script, tmp_path).split() == ["True", "True"]


def test_a_program_ends_well_while_streams_are_left(tmp_path):
    script = """
def leave():
    for _ in range(3):
        stream = engine.stream("Who?", max_new_tokens=20_000)
        next(stream)
        streams.append(stream)
streams = []
thread = threading.Thread(target=leave)
thread.start()
thread.join()
print("left")
"""
    assert run(script, tmp_path).strip() == "left"


def test_threads_leave_no_file_open(tiny_engine):
    """Though nothing collects what stands in circles."""
    engine = tiny_engine()

    def answer(number: int) -> None:
        engine.generate(ASK, chunks=[f"{number}. {LAMP}"], max_new_tokens=2)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.disable()
    try:
        before = 0
        for number in range(40):
            thread = threading.Thread(target=answer, args=(number,))
            thread.start()
            thread.join()
            before = before or files()
        assert files() <= before + 4
    finally:
        gc.enable()


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("first", [True, False])
def test_what_the_callers_thread_does_to_torch_changes_nothing(tiny_engine, around, first):
    """Also where the engine starts in it, and in a stream."""
    texts = [LAMP, SHORE]
    plain = tiny_engine(codec="int4")
    expected = plain.generate(ASK, chunks=texts, max_new_tokens=6)
    engine = tiny_engine(codec="int4", cache_dir=plain.cache_dir.with_name("other"))
    if not first:
        engine.generate(ASK, chunks=texts[:1], max_new_tokens=2)
    with AROUND[around]():
        answer = engine.generate(ASK, chunks=texts, max_new_tokens=6)
        assert answer.report.fallback_reason is None
        assert "".join(engine.stream(ASK, chunks=texts, max_new_tokens=6)) == expected.text
        engine.precompute([f"{LAMP} {SHORE}"], progress=False)
        sparse = engine.generate(ASK, chunks=texts, selector="samkv", max_new_tokens=3)
    assert answer.text == expected.text
    assert sparse.text == plain.generate(ASK, chunks=texts, selector="samkv", max_new_tokens=3).text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_noticed(tiny_engine, attention):
    engine = tiny_engine(LONG)
    before = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=4)
    engine.runtime.model.set_attn_implementation(attention)
    after = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=4)
    assert after.text == before.text
    assert after.report.fallback_reason is None
    assert engine.generate(ASK, max_new_tokens=2).text
