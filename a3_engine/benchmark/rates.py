"""What the machine does at best: matrix products and copies, timed where the model runs."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from a3_engine.benchmark.roofline import Shape
from a3_engine.model.packing import PackedLinear
from a3_engine.native import loops

REPEATS = 5
SQUARE = {"cpu": 2048}  # side of a product that is large for the device
LARGE_SQUARE = 8192
COPIED = 2**28  # bytes, far more than caches hold
LAYERS = 4  # the weights of four layers in turn do not stay in the caches between two products
ATTENDED_ROWS = 256  # scores of more rows at once would only take memory


@dataclass(frozen=True)
class Rates:
    """Of matrix products in operations a second, of copies in bytes read and written a second.

    ``new_copy`` is a copy's rate into memory that the system has yet to hand out, page by page.
    """

    matmul: float
    copy: float
    new_copy: float

    def best(self, other: Rates) -> Rates:
        """The higher of each."""
        return Rates(*map(max, zip(astuple(self), astuple(other), strict=True)))


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a reader of the figures has to know; ``loops`` are those in C++, of this dtype."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
        name = ", ".join(sorted(models)) or name
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "dtype": str(dtype).removeprefix("torch."),
        "loops": device.type == "cpu" and loops.library(dtype, None) is not None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A large square product in the model's dtype, and large copies; the fastest of five."""
    side = SQUARE.get(device.type, LARGE_SQUARE)
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    copy_s, new_copy_s = copy_seconds(COPIED, device, device)
    return Rates(
        matmul=2 * side**3 / fastest(lambda: left @ right, device),
        copy=2 * COPIED / copy_s,
        new_copy=2 * COPIED / new_copy_s,
    )


@torch.inference_mode()
def copy_seconds(nbytes: int, origin: torch.device, device: torch.device) -> tuple[float, float]:
    """Of a plain copy into memory at hand, and into new memory; the fastest of five each.

    From the host to a GPU it begins in pinned memory.
    """
    pinned = origin.type == "cpu" and device.type == "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, device=origin, pin_memory=pinned)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return (
        fastest(lambda: target.copy_(source), device),
        fastest(lambda: torch.empty_like(target).copy_(source), device),
    )


@torch.inference_mode()
def linear_rate(model: PreTrainedModel, n_rows: int) -> float:
    """Operations a second of the model's own linear layers for this number of rows."""
    layers = model.get_decoder().layers[:LAYERS]
    maps = [
        each
        for layer in layers
        for each in layer.modules()
        if isinstance(each, nn.Linear | PackedLinear)
    ]
    device = next(layers[0].parameters()).device
    inputs = {
        each.in_features: torch.randn(n_rows, each.in_features, dtype=model.dtype, device=device)
        for each in maps
    }

    def run() -> None:
        for each in maps:
            each(inputs[each.in_features])

    weights = sum(each.in_features * each.out_features for each in maps)
    return 2 * n_rows * weights / fastest(run, device)


@torch.inference_mode()
def attention_rate(model: PreTrainedModel, n_rows: int, n_keys: int) -> float:
    """Operations a second of one layer's two products of attention, without its softmax."""
    shape, device = Shape.of(model.config), model.device
    rows = shape.heads // shape.kv_heads * min(n_rows, ATTENDED_ROWS)
    query = torch.randn(shape.kv_heads, rows, shape.head_dim, dtype=model.dtype, device=device)
    key = torch.randn(shape.kv_heads, n_keys, shape.head_dim, dtype=model.dtype, device=device)
    flops = 4 * shape.head_dim * shape.kv_heads * rows * n_keys
    return flops / fastest(lambda: query @ key.transpose(1, 2) @ key, device)


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call()
    times = []
    for _ in range(REPEATS):
        started = now(device)
        call()
        times.append(now(device) - started)
    return min(times)


def now(device: torch.device) -> float:
    """The clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
