"""Where models compute, and what a thread leaves after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COUNT_THREADS = """
import os, time, torch
from a3_engine.model.executor import DeviceExecutor

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    torch.ones(1_000_000).exp()
    return threads()

def settled(wanted):
    until = time.monotonic() + 5
    while threads() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return threads()

executor = DeviceExecutor.on(torch.device("cpu"))
before = threads()
print(executor.run(work) - before, settled(before) - before)
print(executor.run(work, release_helpers=False) - before, threads() - before)
executor.release_helpers()
print(settled(before) - before)
"""


@pytest.mark.skipif(
    not list(Path(torch.__file__).parent.glob("lib/libgomp*")) or not Path("/proc/self").exists(),
    reason="this torch does not compute by GNU's OpenMP",
)
def test_the_main_thread_leaves_no_helpers_behind():
    """Two processors' worth of them during the work, none after it, or after the last of it."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.split() == ["1", "0", "1", "1", "0"]
