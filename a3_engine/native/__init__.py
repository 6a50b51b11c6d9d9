"""The three loops that torch has no fast operation for: attend, place, shift.

:mod:`a3_engine.native.loops` runs them in C++ on CPUs, :mod:`a3_engine.native.kernels` in Triton on
GPUs. What neither takes, torch's operations compute.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from a3_engine.native import loops

__all__ = ["attend", "attends", "kernels_on", "loops"]

logger = logging.getLogger(__name__)


def kernels_on(device: torch.device) -> ModuleType | None:
    """The Triton kernels where they run.

    That is on CUDA, unless ``A3_NATIVE=0``, and with ``A3_NATIVE=interpreted`` and
    ``TRITON_INTERPRET=1`` on a CPU, where they are tested.
    """
    wanted = os.environ.get("A3_NATIVE")
    runs = wanted != "0" if device.type == "cuda" else wanted == "interpreted"
    return _kernels() if runs else None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("a3_engine.native.kernels")
    except ImportError as error:
        logger.warning(
            "Triton cannot be imported (%s), so attention on the GPU falls back to torch, which is "
            "several times slower. Install triton, which torch's builds for CUDA on Linux bring.",
            error,
        )
        return None


def attends(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    softcap: float | None = None,
) -> bool:
    """Whether :func:`attend` takes these."""
    if kernels_on(query.device) is not None:
        return all(
            one.stride(-1) == 1 and key.stride() == value.stride() and one.dtype == query.dtype
            for key, value in zip(keys, values, strict=True)
            for one in (key, value)
        )
    return softcap is None and loops.attends(query, keys, values)


def attend(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    first: torch.Tensor,
    last: torch.Tensor,
    scaling: float,
    shared: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the rows of several sequences; see :func:`loops.attend`."""
    if (kernels := kernels_on(query.device)) is not None:
        return kernels.attend(query, keys, values, first, last, scaling, shared, softcap)
    return loops.attend(query, keys, values, first, last, scaling, shared)
