"""Where a model computes: one piece of work after the other, in one thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from a3_engine.model.buffers import Buffers
from a3_engine.processes import Lock, end_at_exit, make_anew_in_child

Result = TypeVar("Result")

_by_device: dict[str, DeviceExecutor] = {}
_making = Lock()
END_S = 60.0  # for what is being computed when the program ends


def _ending_helpers() -> Callable[[], object]:
    """What ends the calling thread's OpenMP helpers, where torch computes by GNU's OpenMP.

    libgomp gives every thread that runs parallel code worker threads of its own, and keeps them.
    With more workers than cores they stop spinning, and each small operation has to wake them. So
    a thread ends its workers when it is done.
    """
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        try:
            pause = ctypes.CDLL(str(library)).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        return lambda: pause(1)  # omp_pause_soft: they come back with the next parallel work
    return lambda: None


_end_helpers = _ending_helpers()


class DeviceExecutor:
    """Runs work for one device.

    Two forwards at once on one device take longer than one after the other, and a second thread
    that computes on a CPU slows both (docs/performance.md). So a program that asks from its main
    thread alone computes there, and as soon as another thread asks, a thread of its own computes
    for all.

    Attributes
    ----------
    buffers : Buffers
        The device's memory that one prompt's cache leaves to the next one's.
    """

    def __init__(self) -> None:
        self.buffers = Buffers()
        self._renew()
        make_anew_in_child(self._renew)

    def _renew(self) -> None:
        self._turn = threading.Lock()
        self._holder: int | None = None
        self._worker: _Worker | None = None

    @staticmethod
    def on(device: torch.device) -> DeviceExecutor:
        """That of a device, for all models on it."""
        with _making:
            return _by_device.setdefault(str(device), DeviceExecutor())

    def run(self, work: Callable[[], Result], *, release_helpers: bool = True) -> Result:
        """The work's result, or its error; from within other work it runs at once.

        With ``release_helpers=False`` the caller has more work soon, and calls `release_helpers`
        after the last of it.
        """
        if threading.get_ident() == self._holder:
            return work()
        if self._worker is None and threading.current_thread() is threading.main_thread():
            try:
                return self._take(work)
            finally:
                if release_helpers:
                    self.release_helpers()
        with _making:
            if self._worker is None:
                self._worker = _Worker()
        return self._worker.run(lambda: self._take(work))

    def release_helpers(self) -> None:
        """Leave the processors to whatever thread computes next."""
        if threading.current_thread() is threading.main_thread():
            _end_helpers()

    def end(self) -> None:
        """Let what is being computed come to its end, and its thread too."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _take(self, work: Callable[[], Result]) -> Result:
        with self._turn, torch.inference_mode(), undisturbed():
            self._holder = threading.get_ident()
            try:
                return work()
            finally:
                self._holder = None


class _Worker:
    """A thread that does one piece of work after the other, also while the interpreter ends."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._go_on, name="a3-compute", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Result]) -> Result:
        future: Future[Any] = Future()
        self._work.put((work, future))
        result: Result = future.result()
        return result

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(END_S)

    def _go_on(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del item, work, future  # not held on to until the next one comes


@contextmanager
def undisturbed() -> Iterator[None]:
    """torch as a thread of its own finds it: without the caller's autocast and default device."""
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _end_all() -> None:
    for executor in _by_device.values():
        executor.end()


end_at_exit(_end_all)
