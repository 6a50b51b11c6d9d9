"""Where a model computes: one piece of work after the other, in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_by_device: dict[str, Computing] = {}
_making = threading.Lock()


class Computing:
    """Runs work for one device.

    Two forwards at once on one device take longer than one after the other. And on a CPU every
    thread that computes gets OpenMP threads of its own, which hinder each other: a request decodes
    slower beside the main thread than in it (docs/performance.md). So a program that asks from its
    main thread alone computes there, and as soon as another thread asks, a thread of its own
    computes for all.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._holder: int | None = None
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def on(device: torch.device) -> Computing:
        """That of a device, for all models on it."""
        with _making:
            return _by_device.setdefault(str(device), Computing())

    def run(self, work: Callable[[], Result]) -> Result:
        """The work's result, or its error; from within other work it runs at once."""
        if threading.get_ident() == self._holder:
            return work()
        if self._pool is None and threading.current_thread() is threading.main_thread():
            return self._take(work)
        with _making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "a3-compute")
        return self._pool.submit(self._take, work).result()

    def _take(self, work: Callable[[], Result]) -> Result:
        with self._turn, torch.inference_mode():
            self._holder = threading.get_ident()
            try:
                return work()
            finally:
                self._holder = None
