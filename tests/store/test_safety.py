"""The store's folder: no entry in it can run code or reach outside, whoever wrote it."""

from __future__ import annotations

import os
import pickle
import sqlite3
import stat
from pathlib import Path

import pytest

from a3_engine import StoreError
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.safe_disk import SafeDisk
from tests.store.stored import chunk, header, holds, payload, payloads


def test_only_the_owner_may_enter_the_folder(tmp_path):
    """Also where the folder was there before."""
    (tmp_path / "open").mkdir(mode=0o755)
    for name in ("open", "new"):
        DiskStore(tmp_path / name).close()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_an_unusable_folder_or_limit_says_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cache_dir"):
        DiskStore(tmp_path / "file")
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
            "INSERT INTO Cache"
            " (key, raw, store_time, access_time, size, mode, filename, value, tag)"
            " VALUES (?, ?, 0, 0, 1, ?, ?, ?, 'planted')",
            (key, raw, mode, filename, value),
        )
        if isinstance(key, str):
            db.execute("INSERT OR IGNORE INTO Tags VALUES (?, 'planted')", (key,))
    db.close()


@pytest.mark.parametrize("where", ["key", "value", "file", "raw value"])
def test_nothing_is_ever_unpickled(store, tmp_path, where):
    """CVE-2025-69872: neither keys nor values, in the index or in files; the store goes on."""
    store.put(payload(1))
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
    good.put(payload(1))
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


def test_a_folder_that_is_a_link_is_not_followed(store, tmp_path):
    """Neither for reading nor for removing what it leads to."""
    store.put(payload(1))
    (path,) = payloads(store)
    outside = tmp_path / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)
    assert store.get(header(1)) is None
    store.put(payload(2))
    store.verify()
    assert (outside / path.name).exists()
    assert holds(store, 2)


def test_what_is_no_plain_file_is_a_miss_and_does_not_hang(store):
    """A pipe would wait for its other end for ever."""
    for make in (os.mkfifo, os.mkdir):
        store.put(payload(1))
        (path,) = payloads(store)
        path.unlink()
        make(path)
        assert store.get(header(1)) is None
        assert isinstance(store.verify(), list)
        if path.is_dir():
            path.rmdir()


def test_an_index_that_is_a_link_is_refused(tmp_path):
    foreign = tmp_path / "foreign.db"
    sqlite3.connect(foreign).close()
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "cache.db").symlink_to(foreign)
    with pytest.raises(StoreError, match="symbolic link"):
        DiskStore(tmp_path / "chunks")
    assert foreign.stat().st_size == 0


def test_payloads_are_the_owners_alone(store):
    store.put(payload(1))
    assert [stat.S_IMODE(path.stat().st_mode) for path in payloads(store)] == [0o600]


def test_a_secret_keeps_others_writing_out(tmp_path):
    """Also in the local folder, and when a file changes after it was read once."""
    plain = DiskStore(tmp_path / "chunks")
    plain.put(payload(1))
    ours = DiskStore(tmp_path / "chunks", secret=b"our secret, 16 bytes")
    assert not holds(ours, 1)
    ours.put(payload(1))
    assert holds(ours, 1)
    assert holds(plain, 1)
    assert ours.verify() == []
    theirs = DiskStore(tmp_path / "chunks", secret=b"their secret, 16 bytes")
    assert theirs.verify(fix=False) != []
    payloads(ours)[0].write_bytes(payload(1).to_bytes())
    assert holds(plain, 1)
    assert not holds(ours, 1)
    for store in (plain, ours, theirs):
        store.close()


def test_the_disk_takes_only_str_keys_and_bytes(tmp_path):
    disk = SafeDisk(str(tmp_path))
    for key in (b"bytes", 5, None, ("a", "b")):
        with pytest.raises(TypeError, match="str"):
            disk.put(key)
    for value in ("text", 5, None, bytearray(b"x"), {"a": 1}):
        with pytest.raises(TypeError, match="bytes"):
            disk.store(value, False, key="key")
    assert list(tmp_path.iterdir()) == []
