"""What all launches need to know of a device."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton

LOG2_E = 1.4426950408889634  # exponentials are powers of 2
# Numbers that follow from a request's lengths: Triton would compile anew for those that are 1 or
# divisible by 16.
LENGTHS = ("rows", "n_parts", "outputs", "seen_seq", "first_layer", "tokens", "start", "n_probes")


def compiled(function: Callable[..., None]) -> Any:
    """A Triton kernel that is compiled once for all lengths."""
    names = [name for name in LENGTHS if name in inspect.signature(function).parameters]
    return triton.jit(function, do_not_specialize=names)


def on(device: torch.device) -> torch.cuda.device:
    """Where a kernel is launched; on the current device Triton needs no telling."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run at once."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
