"""Where a model computes: one piece of work after the other, in one thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_by_device: dict[str, Computing] = {}
_making = threading.Lock()


def _ending_helpers() -> Callable[[], object]:
    """What ends the calling thread's OpenMP helpers, where torch computes by GNU's OpenMP.

    It gives every thread that computes helpers of its own, which stay; and with more of them than
    processors none waits actively any more, so that every small operation has to wake them.
    """
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        try:
            pause = ctypes.CDLL(str(library)).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        return lambda: pause(1)  # omp_pause_soft: they come back with the next parallel work
    return lambda: None


_end_helpers = _ending_helpers()


class Computing:
    """Runs work for one device.

    Two forwards at once on one device take longer than one after the other, and a second thread
    that computes on a CPU slows both (docs/performance.md). So a program that asks from its main
    thread alone computes there, and as soon as another thread asks, a thread of its own computes
    for all.
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

    def run(self, work: Callable[[], Result], *, rest: bool = True) -> Result:
        """The work's result, or its error; from within other work it runs at once.

        Where ``rest`` is false more work follows soon, and somebody calls `rest` after the last.
        """
        if threading.get_ident() == self._holder:
            return work()
        if self._pool is None and threading.current_thread() is threading.main_thread():
            try:
                return self._take(work)
            finally:
                if rest:
                    self.rest()
        with _making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "a3-compute")
        return self._pool.submit(self._take, work).result()

    def rest(self) -> None:
        """Leave the processors to whatever thread computes next."""
        if threading.current_thread() is threading.main_thread():
            _end_helpers()

    def _take(self, work: Callable[[], Result]) -> Result:
        with self._turn, torch.inference_mode():
            self._holder = threading.get_ident()
            try:
                return work()
            finally:
                self._holder = None
