"""What all launches need to know of a device."""

from __future__ import annotations

import functools

import torch

LOG2_E = 1.4426950408889634  # exponentials are powers of 2


def on(device: torch.device) -> torch.cuda.device:
    """Where a kernel is launched; on the current device Triton needs no telling."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run at once."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
