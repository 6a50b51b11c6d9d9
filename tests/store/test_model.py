"""The store against a dict with a byte budget, through evictions, crashes and reopening."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import header, holds, payload, payloads

SEEDS = st.integers(0, 9)
TAGS = st.sampled_from(["a", "b", None])
TOKENS = 50
ROOM = 5  # chunks that fit


class StoreMachine(RuleBasedStateMachine):
    """``model`` has seeds, the least recently used first; ``tags`` are theirs, stored or not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        store = DiskStore(self.folder)
        self.each = len(payload(0, TOKENS).to_bytes())
        empty = store.stats().nbytes
        store.close()
        self.limit = empty + ROOM * self.each + self.each // 2
        self.store = DiskStore(self.folder, self.limit)
        self.model: dict[int, None] = {}
        self.tags: dict[int, set[str]] = {seed: set() for seed in range(10)}

    @rule(seed=SEEDS, tag=TAGS)
    def put(self, seed: int, tag: str | None) -> None:
        assert self.store.put(payload(seed, TOKENS), tag) == self.each
        self.model.pop(seed, None)
        self.model[seed] = None
        self.tags[seed] |= {tag} - {None}
        while len(self.model) > ROOM:
            del self.model[next(iter(self.model))]

    @rule(seed=SEEDS)
    def get(self, seed: int) -> None:
        assert holds(self.store, seed, TOKENS) == (seed in self.model)

    @rule(seeds=st.lists(SEEDS))
    def touch(self, seeds: list[int]) -> None:
        self.store.touch([header(seed).key for seed in seeds])
        for seed in seeds:
            if seed in self.model:
                self.model[seed] = self.model.pop(seed)

    @rule(tag=st.sampled_from(["a", "b"]))
    def evict(self, tag: str) -> None:
        gone = {seed for seed, its in self.tags.items() if its == {tag}}
        stored = {header(seed).key for seed in gone & self.model.keys()}
        assert self.store.evict(tag) == stored
        self.model = {seed: None for seed in self.model if seed not in gone}
        for its in self.tags.values():
            its.discard(tag)

    @rule(seed=SEEDS, tag=st.sampled_from(["a", "b"]))
    def retag(self, seed: int, tag: str) -> None:
        self.store.retag({header(seed).key: tag})
        self.tags[seed].add(tag)

    @rule(seed=SEEDS)
    def discard(self, seed: int) -> None:
        self.store.discard([header(seed).key])
        self.model.pop(seed, None)

    @rule(room=st.integers(0, ROOM))
    def shrink(self, room: int) -> None:
        """To the bytes of so many chunks more than the index takes."""
        index = self.store.stats().nbytes - len(self.model) * self.each
        self.store.shrink(index + room * self.each)
        while len(self.model) > room:
            del self.model[next(iter(self.model))]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = DiskStore(self.folder, self.limit)

    @rule(seed=SEEDS)
    def crash_before_the_row(self, seed: int) -> None:
        """A put that dies when its file is written."""
        self.store._disk.store(payload(seed, TOKENS).to_bytes(), False)
        self.reopen()

    @rule(seed=SEEDS, cut=st.integers(0, 1000))
    def crash_inside_the_file(self, seed: int, cut: int) -> None:
        """A put that dies while its file is being written."""
        self.store._disk.store(payload(seed, TOKENS).to_bytes()[:cut], False)
        self.reopen()

    @rule(seed=SEEDS)
    def crash_before_the_file_goes(self, seed: int) -> None:
        """A removal that dies when its row is gone."""
        with sqlite3.connect(self.folder / "cache.db") as db:
            db.execute("DELETE FROM Cache WHERE key = ?", (header(seed).key,))
        db.close()
        self.model.pop(seed, None)
        self.reopen()

    @rule(seed=SEEDS)
    def damage(self, seed: int) -> None:
        """A bit flips on the disk: a miss, and the others stay."""
        for row, path in self.store.entries():
            if row.key == header(seed).key:
                content = bytearray(path.read_bytes())
                content[-5] ^= 4
                path.write_bytes(content)
        assert not holds(self.store, seed, TOKENS)
        self.model.pop(seed, None)

    @invariant()
    def the_budget_holds_and_nothing_else_is_there(self) -> None:
        keys = {header(seed).key: seed for seed in range(10)}
        found = {keys[key] for key in self.store.contains_many(keys)}
        assert found == set(self.model)
        stats = self.store.stats()
        assert stats.entries == len(self.model) == len(payloads(self.store))
        assert stats.nbytes <= self.limit

    def teardown(self) -> None:
        assert self.store.verify() == []
        self.store.close()
        shutil.rmtree(self.folder)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
