"""The chunk store: what it returns is what was put, or nothing, and no entry can do harm."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import stat
from pathlib import Path

import pytest
import torch

from a3_engine import StoreError
from a3_engine.chunks.catalogue import Catalogue
from a3_engine.chunks.codec import ChunkKV, Header
from a3_engine.chunks.store import DiskStore, SafeDisk

SPAWN = multiprocessing.get_context("spawn")


def chunk(seed: int, n_tokens: int = 5, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, n_tokens, 8)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return ChunkKV(keys, values)


def header(seed: int, n_tokens: int = 5, dtype: torch.dtype = torch.float32) -> Header:
    return Header(f"{seed:064x}", "an engine", n_tokens, str(dtype))


def holds(store: DiskStore, seed: int, n_tokens: int = 5) -> bool:
    """Whether the store returns this chunk; anything else that it returns is an error."""
    kv = store.get(header(seed, n_tokens))
    if kv is not None:
        assert torch.equal(kv.keys, chunk(seed, n_tokens).keys)
        assert torch.equal(kv.values, chunk(seed, n_tokens).values)
    return kv is not None


@pytest.fixture
def store(tmp_path: Path):
    store = DiskStore(tmp_path / "chunks")
    yield store
    store.close()


def payloads(store: DiskStore) -> list[Path]:
    return sorted(store.directory.glob("**/*.val"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_comes_back(store, dtype):
    written = store.put(header(1, dtype=dtype), chunk(1, dtype=dtype))
    kv, again = store.get(header(1, dtype=dtype)), chunk(1, dtype=dtype)
    assert (kv.keys.dtype, kv.values.dtype) == (dtype, dtype)
    assert torch.equal(kv.keys, again.keys)
    assert torch.equal(kv.values, again.values)
    assert written == sum(path.stat().st_size for path in payloads(store))


def test_what_was_not_put_is_none(store):
    assert store.get(header(1)) is None
    store.put(header(1), chunk(1))
    assert store.get(header(2)) is None


def test_other_expectations_of_the_same_key_are_a_miss(store):
    """The payload says what it is; one that says something else is not used."""
    for wrong in ({"engine": "another"}, {"n_tokens": 6}, {"dtype": "torch.float16"}):
        store.put(header(1), chunk(1))
        assert store.get(Header(**{**vars(header(1)), **wrong})) is None


def test_a_truncated_payload_is_a_miss_and_can_be_put_again(store, caplog):
    store.put(header(1), chunk(1))
    (path,) = payloads(store)
    path.write_bytes(path.read_bytes()[:-7])
    assert not holds(store, 1)
    assert "damaged" in caplog.text
    assert store.stats().entries == 0
    assert store.contains_many([header(1).key]) == set()
    store.put(header(1), chunk(1))
    assert holds(store, 1)


def test_swapped_payloads_are_misses(store):
    """Equal in shape, but each the other's chunk."""
    store.put(header(1), chunk(1))
    store.put(header(2), chunk(2))
    one, two = payloads(store)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert not holds(store, 1)
    assert not holds(store, 2)


def test_verify_finds_a_flipped_bit_and_spares_the_rest(store):
    for seed in (1, 2, 3):
        store.put(header(seed), chunk(seed))
    assert store.verify() == []
    path = payloads(store)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (problem,) = store.verify()
    assert header(2).key in problem
    assert [holds(store, seed) for seed in (1, 2, 3)] == [True, False, True]
    assert store.verify() == []


def test_verify_removes_files_that_no_entry_names(store):
    """A process that was killed leaves such a file; the catalogue beside the entries stays."""
    store.put(header(1), chunk(1))
    catalogue = Catalogue(store.directory / "texts.sqlite3", "engine")
    text = "A text that is long enough to be found again."
    catalogue.add([(text, None)])
    catalogue.close()
    orphan = store.directory / "ab" / "cd" / f"{'e' * 28}.val"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half a payload")
    problems = store.verify()
    assert not orphan.exists()
    assert any(orphan.name in problem for problem in problems)
    assert holds(store, 1)
    assert store.verify() == []
    reopened = Catalogue(store.directory / "texts.sqlite3", "engine")
    assert len(reopened.find(text)) == 1
    reopened.close()


def test_the_least_recently_used_chunks_go_first(tmp_path, store):
    """When the limit is reached; a chunk that was just put, or just read, stays."""
    one = store.put(header(0, 200), chunk(0, 200))
    small = DiskStore(tmp_path / "small", size_limit=100_000 + 6 * one)  # the index takes its part
    for seed in range(20):
        small.put(header(seed, 200), chunk(seed, 200))
        assert holds(small, seed, 200)
        assert holds(small, 0, 200)
    kept = [
        seed for seed in range(20) if header(seed).key in small.contains_many([header(seed).key])
    ]
    assert 4 <= len(kept) <= 7
    assert kept == [0, *range(21 - len(kept), 20)]
    assert small.stats().nbytes <= small.size_limit
    small.close()


def test_a_payload_larger_than_the_limit_is_not_kept(tmp_path, caplog):
    """It says so, and pushes nothing else out."""
    small = DiskStore(tmp_path / "small", size_limit=100_000)
    small.put(header(1), chunk(1))
    assert small.put(header(2, 2000), chunk(2, 2000)) == 0
    assert "size_limit" in caplog.text
    assert not holds(small, 2, 2000)
    assert holds(small, 1)
    small.close()


def test_eviction_by_tag_and_counts(store):
    for seed, tag in enumerate(["a", "b", "a", None]):
        store.put(header(seed), chunk(seed), tag)
    keys = [header(seed).key for seed in range(5)]
    assert store.contains_many(keys) == set(keys[:4])
    stats = store.stats()
    assert (stats.entries, stats.directory) == (4, str(store.directory))
    assert sum(p.stat().st_size for p in payloads(store)) <= stats.nbytes <= stats.size_limit
    assert store.evict("a") == 2
    assert store.evict("nobody's") == 0
    assert [holds(store, seed) for seed in range(4)] == [False, True, False, True]
    assert len(payloads(store)) == store.stats().entries == 2


def test_only_the_owner_may_enter_the_folder(tmp_path):
    """Also where the folder was there before."""
    (tmp_path / "open").mkdir(mode=0o755)
    for name in ("open", "new"):
        DiskStore(tmp_path / name).close()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_an_unusable_folder_or_limit_says_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "cache.db").write_text("not a database " * 100)
    for path in (tmp_path / "file", tmp_path / "chunks"):
        with pytest.raises(StoreError, match="cache_dir"):
            DiskStore(path)
    with pytest.raises(ValueError, match="-1"):
        DiskStore(tmp_path / "new", size_limit=-1)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(store: DiskStore, key: object, raw: int, mode: int, filename: object, value: object):
    """A row that somebody else writes into the index."""
    with sqlite3.connect(store.directory / "cache.db") as db:
        db.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename, value, tag)"
            " VALUES (?, ?, 0, 0, 1, ?, ?, ?, 'planted')",
            (key, raw, mode, filename, value),
        )
    db.close()


@pytest.mark.parametrize("where", ["key", "value", "file", "raw value"])
def test_nothing_is_ever_unpickled(store, tmp_path, where):
    """CVE-2025-69872: neither keys nor values, in the index or in files; the store goes on."""
    store.put(header(1), chunk(1))
    trap, planted = tmp_path / "sprung", header(2).key
    evil = pickle.dumps(Evil(trap))
    if where == "key":
        plant(store, evil, 0, 2, payloads(store)[0].relative_to(store.directory).as_posix(), None)
    elif where == "file":
        name = f"ab/cd/{'e' * 28}.val"
        (store.directory / name).parent.mkdir(parents=True)
        (store.directory / name).write_bytes(evil)
        plant(store, planted, 1, 4, name, None)
    else:
        plant(store, planted, 1, 4 if where == "value" else 1, None, evil)
    assert not holds(store, 2)
    assert store.contains_many([header(1).key]) == {header(1).key}
    store.stats()
    store.verify()
    store.evict("planted")
    assert not trap.exists()
    assert holds(store, 1) or where == "key"  # that row named the payload of chunk 1
    pickle.loads(evil)
    assert trap.exists()


@pytest.mark.parametrize("reach", ["get", "verify", "evict"])
@pytest.mark.parametrize("name", ["../../secret", "link", "absolute"])
def test_files_outside_are_neither_read_nor_removed(store, tmp_path, name, reach):
    secret = tmp_path / "secret"
    good = DiskStore(tmp_path / "other")
    good.put(header(1), chunk(1))
    secret.write_bytes(payloads(good)[0].read_bytes())  # would be a hit if it were read
    good.close()
    filename = {"absolute": str(secret), "link": f"ab/cd/{'e' * 28}.val"}.get(name, name)
    if name == "link":
        (store.directory / filename).parent.mkdir(parents=True)
        (store.directory / filename).symlink_to(secret)
    plant(store, header(1).key, 1, 2, filename, None)
    actions = {"get": lambda: store.get(header(1)), "evict": lambda: store.evict("planted")}
    assert actions.get(reach, store.verify)() != chunk(1)
    assert store.get(header(1)) is None
    assert store.stats().entries == 0
    assert secret.exists()


def test_the_disk_takes_only_str_keys_and_bytes(tmp_path):
    disk = SafeDisk(str(tmp_path))
    for key in (b"bytes", 5, None, ("a", "b")):
        with pytest.raises(TypeError, match="str"):
            disk.put(key)
    for value in ("text", 5, None, bytearray(b"x"), {"a": 1}):
        with pytest.raises(TypeError, match="bytes"):
            disk.store(value, False, key="key")
    assert list(tmp_path.iterdir()) == []


def _answer(directory: Path, pipe) -> None:
    """Another process: reads what the first has put, and puts another."""
    store = DiskStore(directory)
    found = holds(store, 1)
    store.put(header(2), chunk(2))
    pipe.send(found)


def test_processes_see_each_others_chunks(store):
    store.put(header(1), chunk(1))
    assert not holds(store, 2)
    receive, send = SPAWN.Pipe(duplex=False)
    other = SPAWN.Process(target=_answer, args=(store.directory, send))
    other.start()
    assert receive.poll(60)
    assert receive.recv()
    other.join(60)
    assert holds(store, 2)


def _put_forever(directory: Path, pipe) -> None:
    store, seed = DiskStore(directory), 0
    while True:
        store.put(header(seed, 400), chunk(seed, 400))
        pipe.send(seed)
        seed += 1


def test_what_was_reported_survives_a_kill(tmp_path):
    """Every chunk whose put had returned when the process was killed reads back equal."""
    receive, send = SPAWN.Pipe(duplex=False)
    writer = SPAWN.Process(target=_put_forever, args=(tmp_path / "chunks", send))
    writer.start()
    send.close()
    reported = []
    while len(reported) < 30:
        assert receive.poll(60)
        reported.append(receive.recv())
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    while receive.poll(0):
        try:
            reported.append(receive.recv())
        except EOFError:
            break
    store = DiskStore(tmp_path / "chunks")
    assert [seed for seed in reported if not holds(store, seed, 400)] == []
    store.verify()
    assert all(holds(store, seed, 400) for seed in reported)
    assert store.verify() == []
    store.close()
