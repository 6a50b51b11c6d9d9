"""A request is answered whatever happens to the store; what the store knows is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

from a3_engine import A3Engine, Chunk, StoreOptions
from a3_engine.chunks.tiers import open_store
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.cli import main
from a3_integrations.llama_index import A3LLM, A3Synthesizer
from tests.store.servers import peer
from tests.store.stored import header, holds, payload, payloads
from tests.store.test_faults import small_disk
from tests.tiny import LONG, STAND_IN, tiny_model, tiny_tokenizer

LAMP = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."
SHORE = "The northern shore is steep, and few boats land there before the ice is broken."
ASK = "Who sleeps?"
PATIENCE = 1.0  # seconds that a request waits for a lock


@contextlib.contextmanager
def index_locked(folder: Path) -> Iterator[None]:
    """As another process that is in the middle of a write, or stopped there."""
    lock = sqlite3.connect(folder / "chunks" / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        lock.execute("ROLLBACK")
        lock.close()


@contextlib.contextmanager
def writers_locked(folder: Path) -> Iterator[None]:
    with (folder / "chunks" / "writers.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


LOCKS = [index_locked, writers_locked]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def nodes(*texts: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_locked_store_serves_hits_at_once_and_misses_soon(tiny_engine, tmp_path, caplog, lock):
    """Also at the start of another process, and where a damaged chunk is met."""
    engine = tiny_engine()
    engine.precompute([LAMP], progress=False)
    plain = engine.generate(f"{LAMP} {SHORE} {ASK}", selector="full_prefill", max_new_tokens=3)
    with lock(tmp_path / "cache"):
        other = tiny_engine()
        for each in (engine, other):
            with at_most(3 * PATIENCE):
                each.runtime  # noqa: B018
            with at_most(PATIENCE):
                assert each.generate(ASK, chunks=[LAMP], max_new_tokens=3).report.hits == 1
                assert each.precompute([LAMP], progress=False).present == 1
        with at_most(3 * PATIENCE):
            answer = engine.generate(ASK, chunks=[LAMP, SHORE], max_new_tokens=3)
        assert (answer.report.hits, answer.report.misses) == (1, 1)
        assert "this request only" in caplog.text
        payloads(DiskStore(tmp_path / "cache" / "chunks", readonly=True))[-1].write_bytes(b"x")
        with at_most(3 * PATIENCE):
            engine.generate(ASK, chunks=[LAMP], max_new_tokens=3)
    again = engine.generate(f"{LAMP} {SHORE} {ASK}", ratio=1.0, max_new_tokens=3)
    assert again.text == plain.text


@pytest.mark.parametrize("lock", LOCKS)
def test_the_synthesizer_waits_for_no_lock(tiny_engine, tmp_path, lock):
    """Neither for stored nodes nor for new ones longer than a request may; never on the loop."""
    engine = tiny_engine(LONG)
    engine.precompute([LAMP], progress=False)
    synthesizer = A3Synthesizer(A3LLM(engine=engine, max_new_tokens=3))

    async def ask(*texts: str) -> float:
        """The longest time that the event loop stood still."""
        answering = asyncio.create_task(synthesizer.asynthesize(ASK, nodes(*texts)))
        longest, last = 0.0, time.monotonic()
        while not answering.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        answering.result()
        return longest

    asyncio.run(ask(LAMP))
    with lock(tmp_path / "cache"):
        with at_most(PATIENCE):
            synthesizer.synthesize(ASK, nodes(LAMP))
            assert engine.runtime.reports[-1].hits == 1
        with at_most(5 * PATIENCE):
            assert asyncio.run(ask(LAMP, SHORE)) < 0.7 * PATIENCE
        assert [use.text for use in engine.runtime.reports[-1].chunks] == [LAMP, SHORE]


def test_the_synthesizer_answers_on_a_full_disk(tmp_path):
    with small_disk(tmp_path / "small", 2**20) as disk:
        engine = A3Engine.from_pretrained(
            tiny_model(LONG), tiny_tokenizer(), cache_dir=disk, stand_in=STAND_IN
        )
        engine.precompute([LAMP], progress=False)
        synthesizer = A3Synthesizer(A3LLM(engine=engine, max_new_tokens=3))
        expected = synthesizer.synthesize(ASK, nodes(LAMP)).response
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        assert synthesizer.synthesize(ASK, nodes(LAMP)).response == expected
        assert engine.runtime.reports[-1].hits == 1
        engine.close()


def test_nothing_is_written_for_a_hit(tiny_engine, tmp_path):
    """But the marks of use."""
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "doc")], progress=False)
    engine.remember([Chunk(LAMP, "doc")])
    with sqlite3.connect(tmp_path / "cache" / "chunks" / "cache.db") as db:
        version = "PRAGMA data_version"
        before = db.execute(version).fetchone()
        engine.remember([Chunk(LAMP, "doc")])
        engine.precompute([Chunk(LAMP, "doc")], progress=False)
        assert db.execute(version).fetchone() == before
    db.close()


# What a chunk's tags are


def test_a_chunk_stays_as_long_as_a_document_has_it(tiny_engine):
    """Whichever document brought it first, and whichever is removed first."""
    for first, second in (("one", "two"), ("two", "one")):
        engine = tiny_engine()
        engine.precompute([Chunk(LAMP, "one"), Chunk(SHORE, "one")], progress=False)
        assert engine.precompute([Chunk(LAMP, "two")], progress=False).present == 1
        engine.evict(first)
        assert engine.generate(f"{LAMP} {ASK}", max_new_tokens=2).report.hits == 1
        assert engine.evict(second) >= 1
        report = engine.generate(f"{LAMP} {SHORE} {ASK}", max_new_tokens=2).report
        assert (report.hits, report.misses) == (0, 0)
        assert engine.stats().entries <= 1  # the encode prefix


def test_a_chunk_that_had_no_tag_goes_with_the_first_that_it_gets(tiny_engine):
    engine = tiny_engine(LONG)
    engine.precompute([LAMP, SHORE], progress=False)
    synthesizer = A3Synthesizer(A3LLM(engine=engine, max_new_tokens=3))
    node = TextNode(text=LAMP)
    node.relationships = TextNode.model_validate(
        {"text": LAMP, "relationships": {"1": {"node_id": "doc1"}}}
    ).relationships
    synthesizer.synthesize(ASK, [NodeWithScore(node=node, score=1.0)])
    engine.remember([Chunk(SHORE, "doc2")])
    assert engine.evict("doc1") == engine.evict("doc2") == 1


def test_tags_outlive_a_chunk_that_went_for_want_of_room(tiny_engine):
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "doc")], progress=False)
    engine.runtime.store.local.shrink(0)
    assert engine.generate(f"{LAMP} {ASK}", max_new_tokens=2).report.misses == 1
    assert engine.evict("doc") == 1


# Size


def test_a_store_that_is_too_small_says_so_before_and_after(tiny_engine, caplog):
    texts = [f"{number}. {LAMP}" for number in range(12)]
    probe = tiny_engine()
    probe.precompute(texts[:1], progress=False)
    each = probe.stats().nbytes
    probe.evict("none")
    engine = tiny_engine(size_limit=probe.stats().nbytes + 3 * (each // 8))
    done = engine.precompute(texts, progress=False)
    stored = engine.runtime.store.contains_many(
        engine.runtime.library.header(s).key for s in engine.runtime.planner.segments(texts)
    )
    assert done.dropped == len(texts) - len(stored) > 0
    assert caplog.text.count("dropped") >= 1
    assert "size_limit" in caplog.text
    assert "int8" in caplog.text


def test_the_size_limit_follows_the_free_disk(tmp_path):
    store = DiskStore(tmp_path / "chunks")
    free = shutil.disk_usage(tmp_path).free
    assert 0.4 * free < store.size_limit < 0.6 * free
    store.close()


# What happens around the folder


def test_a_folder_removed_under_an_engine_loses_nothing_that_comes_later(tiny_engine, tmp_path):
    engine = tiny_engine()
    engine.precompute([LAMP], progress=False)
    shutil.rmtree(tmp_path / "cache")
    engine.precompute([SHORE], progress=False)
    engine.close()
    report = tiny_engine().generate(f"{SHORE} {ASK}", max_new_tokens=2).report
    assert report.hits == 1


def test_a_relative_folder_stays_where_it_is(tiny_engine, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    engine = tiny_engine(cache_dir="kv")
    engine.precompute([LAMP], progress=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine.close()
    assert engine.precompute([LAMP], progress=False).present == 1
    store = DiskStore("chunks")
    store.put(payload(1))
    monkeypatch.chdir(tmp_path)
    assert holds(store, 1)
    assert not (tmp_path / "chunks").exists()


def test_commands_that_read_make_no_files(tmp_path, capsys):
    store = DiskStore(tmp_path / "kv" / "chunks")
    store.put(payload(1), "doc")
    store.close()
    (tmp_path / "kv" / "chunks" / "writers.lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*")}
    for command in ("stats", "ls", "verify", "doctor"):
        main(["cache", command, "--cache-dir", str(tmp_path / "kv")])
    main(["cache", "export", str(tmp_path / "x.tar"), "--cache-dir", str(tmp_path / "kv")])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*")} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_makes_belongs_to_the_folders_owner(tmp_path):
    folder = tmp_path / "chunks"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    store = DiskStore(folder)
    store.put(payload(1))
    assert {path.stat().st_uid for path in folder.rglob("*")} == {65534}
    store.close()


def test_the_folder_and_all_that_is_in_it_are_the_owners_alone(tmp_path):
    """Whatever the umask, and whatever they were before."""
    before = os.umask(0o022)
    try:
        store = DiskStore(tmp_path / "chunks")
        store.put(payload(1), "doc")
        store.close()
        for path in (tmp_path / "chunks").glob("*.*"):
            path.chmod(0o644)
        store = DiskStore(tmp_path / "chunks")
        store.put(payload(2), "doc")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "chunks").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "chunks").stat().st_mode) == 0o700
    store.close()


def test_nothing_is_left_of_what_was_evicted(tiny_engine, tmp_path):
    """No word of its text, and no letter of its tag, in any file of the folder."""
    engine = tiny_engine()
    engine.precompute([Chunk(LAMP, "a-secret-tag"), Chunk(SHORE, "kept")], progress=False)
    engine.evict("a-secret-tag")
    engine.close()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    left = b"".join(path.read_bytes() for path in files)
    assert b"a-secret-tag" not in left
    assert LAMP[:32].encode() not in left
    assert SHORE[:32].encode() in left


# The shared store


def slow(connection) -> None:
    """Answers each call a little before its time is over."""
    while connection.recv(4096):
        time.sleep(0.4)
        connection.sendall(b"*0\r\n")


@pytest.mark.usefixtures("socket_enabled")
def test_a_slow_shared_store_has_one_deadline_a_request(tiny_engine):
    with peer(slow) as port:
        options = StoreOptions(f"redis://127.0.0.1:{port}/0", timeout=1.0)
        engine = tiny_engine(store=options)
        engine.runtime  # noqa: B018
        with at_most(3.0):
            texts = [f"{number}. {LAMP}" for number in range(6)]
            assert engine.generate(ASK, chunks=texts, max_new_tokens=2).report.misses == 6


def test_a_shared_chunk_stays_as_long_as_a_document_has_it(tmp_path):
    url = f"file://{tmp_path}/shared"
    stores = [open_store(tmp_path / name, options=StoreOptions(url)) for name in ("a", "b")]
    stores[0].put(payload(1), "one")
    stores[1].put(payload(1), "two")
    assert stores[0].evict("one") == {header(1).key}
    assert holds(open_store(tmp_path / "c", options=StoreOptions(url)), 1)
    stores[1].evict("two")
    assert not holds(open_store(tmp_path / "d", options=StoreOptions(url)), 1)


def test_an_engine_may_be_closed_while_it_is_used(tiny_engine):
    """What is in progress goes on; the next call opens anew."""
    engine = tiny_engine()
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for number in range(3):
                engine.precompute([f"{number}. {LAMP}"], progress=False)
                engine.generate(ASK, chunks=[LAMP], max_new_tokens=1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    while thread.is_alive():
        engine.close()
        time.sleep(0.02)
    thread.join()
    assert failures == []
