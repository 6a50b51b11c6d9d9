"""The texts of stored chunks, to find them again inside a finished prompt.

A framework may hand over nothing but one long string. Every text of a stored chunk that stands in
it, to the letter, can be served from the cache. A candidate begins like a known text, ends like a
known text and is as long as one that begins so, each by `ANCHOR` characters; a hash of the whole
text decides. Heads alone would not do: texts with metadata often begin alike by the thousand.

It is an index of what the chunks hold, and no answer waits for it: what a request adds is known at
once, and written when there is time.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from a3_engine.chunks.known import ANCHOR, About, Known, text_hash
from a3_engine.chunks.patience import one_request
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.index import Note
from a3_engine.errors import StoreError
from a3_engine.processes import Lock

logger = logging.getLogger(__name__)

FEW = 8  # lengths that are tried one by one
MOST_UNWRITTEN = 100_000  # texts; older ones are let go of, and found by their chunks' own words


class Match(NamedTuple):
    """A known text at ``text[start:stop]``."""

    start: int
    stop: int


class Catalogue:
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
        self._tails: set[str] = set()
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
            starts = [(at, self._lengths[w]) for at, w in enumerate(windows) if w in heads]
            # Where thousands begin alike, only the lengths that end at a known tail are tried.
            many = any(len(lengths) > FEW for _, lengths in starts)
            stops = [
                at + ANCHOR for at, window in enumerate(windows) if many and window in self._tails
            ]
            matches: list[Match] = []
            behind = 0
            for start, lengths in starts:
                if start >= behind and (match := self._longest(text, start, lengths, stops)):
                    matches.append(match)
                    behind = match.stop
            return matches

    def _longest(self, text: str, start: int, lengths: set[int], stops: list[int]) -> Match | None:
        if len(lengths) > FEW:
            candidates = [stop for stop in stops if stop - start in lengths]
        else:
            candidates = [start + chars for chars in lengths if start + chars <= len(text)]
        for stop in sorted(candidates, reverse=True):
            if text_hash(text[start:stop]) in self._hashes:
                return Match(start, stop)
        return None

    def _refresh(self) -> None:
        """Read what this or another process has added since; all of it after a removal."""
        forgotten, last, texts = self._store.texts(self._engine, self._seen)
        if forgotten != self._forgotten:
            self._lengths, self._tails, self._hashes = {}, set(), set()
            forgotten, last, texts = self._store.texts(self._engine, 0)
            texts += [note.about.known for note in self._unwritten if note.about.known]
        self._take(texts)
        self._seen, self._forgotten = last, forgotten

    def _take(self, texts: Iterable[Known]) -> None:
        for sha256, chars, head, tail in texts:
            self._lengths.setdefault(head, set()).add(chars)
            self._tails.add(tail)
            self._hashes.add(sha256)
