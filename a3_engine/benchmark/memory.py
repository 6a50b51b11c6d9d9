"""The most memory that a call takes beyond what stood before it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from a3_engine.model.executor import DeviceExecutor

PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes between the memory before a call and its highest during the call.

    On CUDA what torch has allocated there; otherwise the resident set of the process, in which
    the pages of files that are read by mapping count too. None where neither can be known: the
    resident set's peak can be reset on Linux only.
    """
    gc.collect()
    DeviceExecutor.on(torch.device("cpu")).buffers.clear()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    _give_back_freed()
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _give_back_freed() -> None:
    """Else what an earlier call freed would be taken again, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
