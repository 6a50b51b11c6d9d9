"""Finished turns of conversations, on their way into the store.

They are computed after the stand-in like every chunk, so that they hold nothing of other
documents or conversations, beside the answers to come: one at a time, while nobody waits for a
first token. They stay on this machine, until they were not used for some time, or the engine is
closed.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from a3_engine.chunks.library import ChunkLibrary
from a3_engine.chunks.tiers import DiskStore
from a3_engine.conversations import TAG
from a3_engine.errors import StoreError
from a3_engine.processes import end_at_exit, make_anew_in_child
from a3_engine.segments import Segment

logger = logging.getLogger(__name__)

DAY_S = 24 * 3600.0
PAUSE_S = 0.05  # after an answer: an agent asks again at once
PATIENCE_S = 2.0  # with somebody waiting for a first token all the time
END_S = 60.0  # for the turn that is being computed when the program ends

_working: weakref.WeakSet[Turns] = weakref.WeakSet()


class Turns:
    """The turns of one engine's conversations.

    Parameters
    ----------
    library : ChunkLibrary
        What computes and stores them.
    store : DiskStore
        Its local folder.
    kept_s : float
        Seconds after its last use that a turn is kept.
    tags : set of str
        Those of conversations that had turns stored before.
    """

    def __init__(
        self, library: ChunkLibrary, store: DiskStore, kept_s: float, tags: Iterable[str] = ()
    ) -> None:
        self._library, self._store, self._kept_s = library, store, kept_s
        self._tags = set(tags)
        self._closed = False
        self._renew()
        make_anew_in_child(self._renew)

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Segment, None] = {}
        self._thread: threading.Thread | None = None
        self._unanswered, self._hurried, self._last = 0, 0, 0.0

    def of(self, library: ChunkLibrary) -> Turns:
        """The same for another library, in place of this one."""
        self._stop()
        return Turns(library, self._store, self._kept_s, self._tags)

    def stored(self, turns: Sequence[Segment]) -> list[bool]:
        """Which of them can be read."""
        keys = [self._library.header(turn).key for turn in turns]
        try:
            found = self._store.used_since(keys, time.time() - self._kept_s)
        except StoreError as error:
            logger.warning("%s The conversation's turns are computed anew.", error)
            return [False] * len(keys)
        return [key in found for key in keys]

    def keep(self, turns: Iterable[Segment]) -> None:
        """Compute and store turns, soon."""
        with self._changed:
            if self._closed:
                return
            for turn in turns:
                self._waiting[turn] = None
                self._tags.add(turn.tag or "")
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="a3-turns", daemon=True)
                _working.add(self)
                self._thread.start()

    def settle(self) -> None:
        """Wait until all that was to be kept is stored."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None)
            self._hurried -= 1

    def drop(self, tag: str) -> None:
        """Store nothing of a conversation that has not been stored yet."""
        with self._changed:
            self._waiting = {turn: None for turn in self._waiting if turn.tag != tag}
        self.settle()  # it may be computed at this moment

    def close(self) -> None:
        """Remove the turns of all conversations that were kept here, and keep none from now on."""
        self._stop()
        for tag in self._tags:
            try:
                self._library.resident.discard(self._store.evict(tag))
            except StoreError as error:
                logger.warning("%s They go when they were not used for some time.", error)

    @contextmanager
    def until_first_token(self) -> Iterator[None]:
        """Nothing is computed here meanwhile."""
        with self._changed:
            self._unanswered += 1
        try:
            yield
        finally:
            with self._changed:
                self._unanswered -= 1
                self._last = time.monotonic()
                self._changed.notify_all()

    def expire(self) -> None:
        """Remove the turns of all conversations in this folder that were not used for long."""
        try:
            self._library.resident.discard(self._store.expire(TAG, time.time() - self._kept_s))
        except StoreError as error:
            logger.warning("%s Old turns of conversations stay for now.", error)

    def _work(self) -> None:
        while True:
            while (turn := self._next()) is not None:
                try:
                    if not self.stored([turn])[0]:
                        self._library.fetch(turn)
                except Exception as error:  # it is computed anew next time
                    logger.warning("A turn of a conversation is not kept: %s", error)
            self.expire()
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def _next(self) -> Segment | None:
        """The next turn, when nobody waits for a first token; None when there is none."""
        with self._changed:
            latest = time.monotonic() + PATIENCE_S
            while self._waiting and not self._hurried and (now := time.monotonic()) < latest:
                ready = latest if self._unanswered else self._last + PAUSE_S
                if ready <= now:
                    break
                self._changed.wait(min(ready, latest) - now)
            turn = next(iter(self._waiting), None)
            if turn is not None:
                del self._waiting[turn]
            return turn

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(END_S)


def _stop_all() -> None:
    for turns in list(_working):
        turns._stop()


end_at_exit(_stop_all)
