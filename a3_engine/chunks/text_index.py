"""The texts of stored chunks, to find them again inside a finished prompt.

A framework may hand over nothing but one long string. Every text of a stored chunk that stands in
it, to the letter, can be served from the cache. A candidate begins like a known text, by `ANCHOR`
characters, and is as long as one that begins so; a rolling sum chooses among them, and a hash of
the whole text decides. So a long prompt takes no longer for each of its letters than a short one,
also where thousands of texts begin alike, or a text goes on repeating itself.

It is an index of what the chunks hold, and no answer waits for it: what a request adds is known at
once, and written when there is time.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from a3_engine.chunks.known import ANCHOR, About, Known, Rolling, text_hash
from a3_engine.chunks.patience import one_request
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.index import Note
from a3_engine.errors import StoreError
from a3_engine.processes import Lock
from a3_engine.segments import Match

logger = logging.getLogger(__name__)

MOST_UNWRITTEN = 100_000  # texts; older ones are let go of, and found by their chunks' own words


class TextIndex:
    """Texts known to one engine, shared by all processes that use the same folder.

    Parameters
    ----------
    store : DiskStore
        Where the chunks are.
    engine : str
        Fingerprint; texts of other engines are not seen.
    """

    def __init__(self, store: DiskStore, engine: str) -> None:
        self._engine, self._store = engine, store
        self._lock = Lock()
        self._seen, self._forgotten = 0, (0, 0)
        self._lengths: dict[str, set[int]] = {}  # by head
        self._sums: set[int] = set()
        self._hashes: set[str] = set()
        self._unwritten: dict[Note, None] = {}

    def add(self, texts: Iterable[tuple[str, str, str | None]]) -> None:
        """Know ``(text, chunk's key, tag)`` from now on; shorter ones than `ANCHOR` are not found.

        Nothing is written; see `write`.
        """
        with self._lock:
            for text, key, tag in texts:
                known = Known.of(text)
                if known is not None or tag is not None:
                    self._unwritten[Note(self._engine, key, About(known, tag))] = None
                self._take([known] if known is not None else [])
            while len(self._unwritten) > MOST_UNWRITTEN:
                del self._unwritten[next(iter(self._unwritten))]

    def write(self) -> None:
        """Write what was added, if it is new. Raises `StoreError`; it can be tried again."""
        with self._lock:
            notes = list(self._unwritten)
        if notes and not self._store.readonly:
            self._store.note(notes)
            with self._lock:
                for note in notes:
                    self._unwritten.pop(note, None)

    def try_to_write(self) -> None:
        """Write what was added unless that takes long; what is left is written later."""
        try:
            with one_request():
                self.write()
        except StoreError as error:
            logger.warning("%s It is known to this process, and written later.", error)

    def find(self, text: str) -> list[Match]:
        """Known texts inside ``text``, leftmost first, the longest where several begin together."""
        with self._lock:
            try:
                self._refresh()
            except (sqlite3.Error, StoreError) as error:  # what is known already still serves
                logger.warning("The texts of stored chunks cannot be read: %s.", error)
            windows = [text[at : at + ANCHOR] for at in range(len(text) - ANCHOR + 1)]
            heads = self._lengths.keys() & windows  # faster than asking for them one by one
            if not heads:
                return []
            lengths = {head: np.array(sorted(self._lengths[head], reverse=True)) for head in heads}
            sums = Rolling(text)
            matches: list[Match] = []
            passed = 0
            for start, window in enumerate(windows):
                if window in heads and start >= passed:
                    stops = start + lengths[window]
                    if (stop := self._longest(text, start, stops, sums)) is not None:
                        matches.append(Match(start, stop))
                        passed = stop
            return matches

    def of(self, engine: str) -> TextIndex:
        """The same for another engine."""
        return TextIndex(self._store, engine)

    def _longest(
        self, text: str, start: int, stops: npt.NDArray[np.int64], sums: Rolling
    ) -> int | None:
        """Where the longest known text that begins here ends; the longest end comes first."""
        stops = stops[stops <= len(text)]
        for stop, found in zip(stops.tolist(), sums.of_all(start, stops).tolist(), strict=True):
            if found in self._sums and text_hash(text[start:stop]) in self._hashes:
                return int(stop)
        return None

    def _refresh(self) -> None:
        """Read what this or another process has added since; all of it after a removal."""
        forgotten, last, texts = self._store.texts(self._engine, self._seen)
        if forgotten != self._forgotten:
            self._lengths, self._sums, self._hashes = {}, set(), set()
            forgotten, last, texts = self._store.texts(self._engine, 0)
            texts += [note.about.known for note in self._unwritten if note.about.known]
        self._take(texts)
        self._seen, self._forgotten = last, forgotten

    def _take(self, texts: Iterable[Known]) -> None:
        for sha256, chars, head, rolling in texts:
            self._lengths.setdefault(head, set()).add(chars)
            self._sums.add(rolling)
            self._hashes.add(sha256)
