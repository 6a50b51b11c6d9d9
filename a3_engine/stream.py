"""A running answer: pieces of text from a thread of its own, for loops and for event loops."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from a3_engine.processes import Lock, end_at_exit
from a3_engine.report import FusionReport

Emit = Callable[[str], None]
Work = Callable[[Emit, Callable[[], bool]], FusionReport]
Item = str | FusionReport | BaseException
END_S = 60.0  # for what is being computed when the program ends

_running: set[tuple[threading.Thread, threading.Event]] = set()
_changing = Lock()


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    report: FusionReport

    def __str__(self) -> str:
        return self.text


def _start(work: Work, sink: Callable[[Item], None]) -> threading.Event:
    """Run the work in a thread; setting the returned event abandons it.

    The thread knows the sink only, so that a stream nobody holds any more can be collected.
    """
    abandoned = threading.Event()

    def run() -> None:
        try:
            sink(work(sink, abandoned.is_set))
        except BaseException as error:  # handed to whoever reads the stream
            sink(error)

    thread = threading.Thread(target=run, name="a3-generate", daemon=True)
    with _changing:
        _running.difference_update({held for held in _running if not held[0].is_alive()})
        thread.start()
        _running.add((thread, abandoned))
    return abandoned


def _abandon_all() -> None:
    """When the program ends: a thread must not be cut off inside torch."""
    with _changing:
        running = set(_running)
    for _, abandoned in running:
        abandoned.set()
    deadline = time.monotonic() + END_S
    for thread, _ in running:
        thread.join(max(0.0, deadline - time.monotonic()))


end_at_exit(_abandon_all)


class TokenStream(Iterator[str]):
    """Pieces of the answer's text as they come.

    Closing it, or dropping it, stops the computation. ``report`` is there after the last piece.
    """

    def __init__(self, work: Work) -> None:
        self.report: FusionReport | None = None
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._done = False
        self._abandoned = _start(work, self._items.put)

    def __next__(self) -> str:
        if self._done:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, str):
            return item
        self._done = True
        if isinstance(item, FusionReport):
            self.report = item
            raise StopIteration
        raise item

    def close(self) -> None:
        """Abandon the answer."""
        self._abandoned.set()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # the constructor may have failed
            self.close()


class AsyncTokenStream(AsyncIterator[str]):
    """The same for an event loop, which it never blocks. Build it inside a running loop."""

    def __init__(self, work: Work) -> None:
        self.report: FusionReport | None = None
        items: asyncio.Queue[Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._items = items
        self._done = False

        def sink(item: Item) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(items.put_nowait, item)

        self._abandoned = _start(work, sink)

    async def __anext__(self) -> str:
        if self._done:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(item, str):
            return item
        self._done = True
        if isinstance(item, FusionReport):
            self.report = item
            raise StopAsyncIteration
        raise item

    def close(self) -> None:
        """Abandon the answer."""
        self._abandoned.set()

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.close()
