"""The one thread in which a model computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class ComputeThread:
    """Runs one piece of work after the other.

    Two forwards at once on one device take longer than one after the other. And on a CPU each
    thread that computes gets a team of OpenMP threads of its own, which wait by spinning: a
    decoding step took 75 ms instead of 50 when it went from one thread to the next.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "a3-compute", initializer=self._begin)
        self._thread = 0

    def _begin(self) -> None:
        self._thread = threading.get_ident()

    def run(self, work: Callable[[], Result]) -> Result:
        """The work's result, or its error; from within other work it runs at once."""
        if threading.get_ident() == self._thread:
            return work()
        return self._pool.submit(torch.inference_mode()(work)).result()
