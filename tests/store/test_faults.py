"""What goes wrong around a store: it says so, loses nothing that it reported, and goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from a3_engine import A3Engine, Chunk, StoreError
from a3_engine.chunks.codecs import CODECS
from a3_engine.chunks.known import About
from a3_engine.chunks.payload import DamagedPayload, Payload, open_bytes, open_file
from a3_engine.chunks.tiers import filesystem
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.filesystem import file_system, refuse_network_share
from tests.store.stored import chunk, header, holds, payload, payloads
from tests.store.troubles import locked_index, small_disk
from tests.tiny import tiny_model, tiny_tokenizer

DOCUMENT = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."


def test_a_full_disk_refuses_puts_and_keeps_what_it_has(tmp_path):
    with small_disk(tmp_path / "small", 2**20) as disk:
        store, kept = DiskStore(disk / "chunks", 2**30), []
        for seed in range(60):  # no half file stays, and no transaction
            with contextlib.suppress(StoreError):
                store.put(payload(seed, 200))
                kept.append(seed)
        with pytest.raises(StoreError, match="space"):
            store.put(payload(99, 2000))
        assert 0 < len(kept) < 60
        assert all(holds(store, seed, 200) for seed in kept)
        assert len(payloads(store)) == store.stats().entries
        store.discard(header(seed).key for seed in kept[: len(kept) // 2 + 1])
        store.put(payload(1000, 200))
        assert holds(store, 1000, 200)
        assert store.verify() == []
        store.close()


def test_a_file_size_limit_is_like_a_full_disk(tmp_path):
    """As a quota is: the write fails in the middle, and no half file stays."""
    store = DiskStore(tmp_path / "chunks")
    store.put(payload(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(StoreError, match="written"):
            store.put(payload(2, 4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(payloads(store)) == 1
    store.put(payload(2, 4000))
    assert holds(store, 1)
    assert holds(store, 2, 4000)
    store.close()


def test_an_engine_answers_on_a_full_disk(tmp_path, caplog):
    with small_disk(tmp_path / "small", 400_000) as disk:
        engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=disk)
        filler = disk / "filler"
        engine.stats()
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        for _ in range(2):
            answer = engine.generate("Who sleeps?", chunks=[DOCUMENT], max_new_tokens=2)
            assert answer.report.misses == 1
        assert "this request only" in caplog.text
        with pytest.raises(StoreError):
            engine.precompute([DOCUMENT * 2], progress=False)
        filler.unlink()
        assert engine.precompute([DOCUMENT], progress=False).computed == 1
        assert engine.generate("Who?", chunks=[DOCUMENT], max_new_tokens=2).report.hits == 1
        engine.close()


def test_a_read_only_folder_serves_what_it_has(tmp_path, caplog):
    with small_disk(tmp_path / "small", 2**21) as disk:
        engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=disk)
        engine.precompute([DOCUMENT], progress=False)
        answer = engine.generate(f"{DOCUMENT} Who sleeps?", max_new_tokens=3)
        engine.close()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            before = sorted(disk.rglob("*"))
            again = engine.generate(f"{DOCUMENT} Who sleeps?", max_new_tokens=3)
            assert (again.text, again.report.hits) == (answer.text, 1)
            other = engine.generate("Who?", chunks=[DOCUMENT * 2], max_new_tokens=3)
            assert other.report.misses == 1
            assert engine.precompute([DOCUMENT], progress=False).present == 1
            assert caplog.text.count("read only") == 1
            with pytest.raises(StoreError):
                engine.evict("a tag")
            assert sorted(disk.rglob("*")) == before
        finally:
            engine.close()
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert engine.generate(f"{DOCUMENT} Who?", max_new_tokens=3).report.hits == 1
        engine.close()


def test_another_users_store_is_read():
    """As a container's user reads the folder that was filled while its image was built."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = DiskStore(folder / "chunks")
        store.put(payload(1))
        store.close()
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                theirs = DiskStore(folder / "chunks")
                os._exit(0 if holds(theirs, 1) and theirs.put(payload(2)) == 0 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert holds(store, 1)
        store.close()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("secret", [None, b"a secret of the tests"])
def test_no_bit_anywhere_may_flip(codec, secret):
    """Every byte of header and tensors, one bit each: a miss, or the same chunk to the bit."""
    original = payload(1, 2, codec=codec)
    content = bytearray(original.to_bytes(secret))
    same = 0
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        try:
            found = open_bytes(bytes(content), original.header, secret)
            same += 1
            assert all(
                torch.equal(found.tensors[n].view(torch.uint8), t.view(torch.uint8))
                for n, t in original.tensors.items()
            )
        except DamagedPayload:
            pass
        content[at] ^= 1 << at % 8
    assert same < 0.05 * len(content)


def test_files_are_checked_like_bytes(tmp_path):
    """Bits and cuts in a file; its checksum is compared when a process first reads it."""
    original, path = payload(1, 2), tmp_path / "payload"
    content = original.to_bytes()
    for at in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        for damaged in (bytes(flipped), content[:at]):
            path.write_bytes(damaged)
            with contextlib.suppress(DamagedPayload):
                found = open_file(path, original.header, None, hashed=False)
                assert all(torch.equal(found.tensors[n], t) for n, t in original.tensors.items())
                assert damaged != content[:at]


def test_a_file_that_changes_after_it_was_read_is_hashed_again(store):
    store.put(payload(1))
    assert holds(store, 1)
    (path,) = payloads(store)
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not holds(store, 1)


@pytest.mark.parametrize(
    "planted",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
        b"",
    ],
)
def test_planted_headers_are_misses(store, planted):
    store.put(payload(1))
    payloads(store)[0].write_bytes(planted)
    assert not holds(store, 1)
    with pytest.raises(DamagedPayload):
        open_bytes(planted, header(1), None)


def test_sound_payloads_of_another_layout_are_misses(store):
    """Well-formed, with a right checksum, but not what the header's codec gives."""
    from safetensors.torch import save

    original = payload(1)
    odd = torch.zeros(3, 2, 5, 8)
    layouts = [
        {"keys": odd},
        {"keys": odd, "values": odd, "more": odd},
        {"keys": odd, "values": odd[:, :1]},
        {"keys": odd, "values": odd.half()},
        {"keys": odd.reshape(6, 1, 5, 8), "values": odd},
        {"keys": odd[:0], "values": odd.repeat(2, 1, 1, 1)},
    ]
    for tensors in layouts:
        forged = Payload(original.header, tensors)
        metadata = {"a3": original.header.to_json(), "sha256": forged.digest().hex()}
        content = save({n: t.clone() for n, t in tensors.items()}, metadata)
        with pytest.raises(DamagedPayload):
            open_bytes(content, original.header, None)
        store.put(original)
        payloads(store)[-1].write_bytes(content)
        assert not holds(store, 1)


def test_a_folder_removed_under_our_feet_is_made_again(store, caplog):
    store.put(payload(1))
    shutil.rmtree(store.directory)
    assert not holds(store, 1)
    store.put(payload(2))
    assert "replaced" in caplog.text
    again = DiskStore(store.directory)
    assert holds(again, 2)
    again.close()


def test_a_folder_that_cannot_be_opened_any_more_is_misses(store, caplog):
    store.put(payload(1))
    shutil.rmtree(store.directory)
    store.directory.write_text("a file now")
    assert not holds(store, 1)
    with pytest.raises(StoreError, match="cannot be opened"):
        store.put(payload(1))
    store.directory.unlink()
    store.put(payload(1))
    assert holds(store, 1)


def test_a_file_removed_under_our_feet_is_a_miss(store):
    store.put(payload(1))
    payloads(store)[0].unlink()
    assert not holds(store, 1)
    assert store.stats().entries == 0


def test_a_mapped_chunk_outlives_its_removal(store):
    """A request that holds a chunk is not hurt by its eviction."""
    store.put(payload(1), tag="doc")
    found = store.get(header(1))
    assert store.evict("doc") == {header(1).key}
    assert torch.equal(found.kv().keys, chunk(1).keys)


def test_another_process_may_exchange_an_entry_while_it_is_read(store):
    """The reader does not remove the new entry for the old one's sake."""
    stop = threading.Event()
    store.put(payload(1))

    def exchange() -> None:
        other = DiskStore(store.directory)
        while not stop.is_set():
            other.put(payload(1))
        other.close()

    writer = threading.Thread(target=exchange)
    writer.start()
    try:
        assert all(holds(store, 1) for _ in range(200))
    finally:
        stop.set()
        writer.join()


def test_reads_do_not_wait_for_a_locked_index(tmp_path):
    locked_index(tmp_path, seconds=1.0, patience=1.0)


def test_the_order_of_use_survives_a_clock_that_jumps(tmp_path, monkeypatch):
    """Back by a year: what is put and used from then on still counts as the last used."""
    one = DiskStore(tmp_path / "size").put(payload(0, 200))
    store = DiskStore(tmp_path / "chunks", size_limit=100_000 + 4 * one)
    now = time.time()
    store.put(payload(0, 200))
    monkeypatch.setattr(time, "time", lambda: now - 365 * 86400)
    for seed in range(1, 12):
        store.put(payload(seed, 200))
        store.touch([header(0).key])
        assert holds(store, seed, 200)
        assert holds(store, 0, 200)
    store.close()


def test_a_newer_or_older_format_is_a_miss_and_stays_whole(store):
    """Its key differs, so each version has entries of its own; a downgrade finds its own again."""
    newer = replace(header(2), version=header(1).version + 1)
    store.put(payload(1))
    store.put(Payload.of(chunk(2), newer))
    assert not holds(store, 2)
    assert holds(store, 1)


def random_start(index: Path) -> None:
    content = bytearray(index.read_bytes())
    content[:4096] = os.urandom(4096)
    index.write_bytes(content)


def in_its_place_a_folder(index: Path) -> None:
    index.unlink()
    index.mkdir()


INDEX_DAMAGES = {
    "random": lambda index: index.write_bytes(os.urandom(20_000)),
    "random start": random_start,
    "text": lambda index: index.write_text("not a database " * 100),
    "cut": lambda index: os.truncate(index, index.stat().st_size // 2),
    "empty": lambda index: os.truncate(index, 0),
    "folder": in_its_place_a_folder,
    "lost": lambda index: index.unlink(),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_lost_or_damaged_index_is_made_anew_from_the_chunks(tiny_engine, tmp_path, damage):
    """Chunks, their texts and their tags are found again, and the answer stays the same."""
    engine = tiny_engine()
    texts = [f"{number}. {DOCUMENT}" for number in range(30)]
    engine.precompute([Chunk(text, "doc") for text in texts], progress=False)
    question = f"{texts[3]} {texts[5]} Who sleeps?"
    answer = engine.generate(question, max_new_tokens=3)
    assert answer.report.hits == 2
    engine.close()
    INDEX_DAMAGES[damage](tmp_path / "cache" / "chunks" / "cache.db")
    again = tiny_engine()
    for _ in range(2):
        later = again.generate(question, max_new_tokens=3)
        assert (later.text, later.report.misses) == (answer.text, 0)
        again.close()
    assert again.evict("doc") == len(texts)
    assert again.generate(question, max_new_tokens=3).report.hits == 0


def test_an_index_damaged_in_use_is_made_anew(tmp_path):
    """Sooner or later sqlite meets the broken page; from then on everything goes on."""
    store = DiskStore(tmp_path / "chunks")
    for seed in range(40):
        store.put(payload(seed))
    store.close()
    store = DiskStore(tmp_path / "chunks")
    index = tmp_path / "chunks" / "cache.db"
    pages = index.stat().st_size // 4096
    with index.open("r+b") as file:
        for page in range(1, pages):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    found = sum(holds(store, seed) for seed in range(40))
    assert found == 40
    store.put(payload(50))
    assert all(holds(store, seed) for seed in [*range(40), 50])
    assert store.verify() == []
    store.close()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda store: holds(store, 1), True),
        (lambda store: store.put(payload(50), "doc") > 0, True),
        (lambda store: store.contains_many(header(n).key for n in (1, 2, 99)),
         {header(1).key, header(2).key}),
        (lambda store: store.stats().entries, 40),
        (lambda store: store.evict("doc"), {header(n).key for n in range(40)}),
        (lambda store: store.discard([header(1).key]), None),
        (lambda store: store.tagged([header(1).key]), {header(1).key}),
        (lambda store: store.verify() and store.verify(), []),
    ],
    ids=["get", "put", "contains", "stats", "evict", "discard", "tagged", "verify"],
)  # fmt: skip
def test_whoever_meets_a_damaged_index_notices_nothing(memory_path, act, expected):
    """It is made anew, and what was asked for is done once more."""
    store = DiskStore(memory_path / "chunks")
    about = About(None, "doc").to_json()
    for seed in range(40):
        store.put(replace(payload(seed), about=about), "doc")
    db = sqlite3.connect(memory_path / "chunks" / "cache.db")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.executescript("DROP TABLE Cache; DROP TABLE Tags; DROP TABLE Settings;")
    db.close()
    assert act(store) == expected
    store.close()


def test_pages_of_the_index_may_be_damaged(tmp_path):
    """Every get is a miss, the right chunk, or, for a put, an error that says so."""
    for start in range(1, 12):
        folder = tmp_path / str(start)
        store = DiskStore(folder)
        for seed in range(8):
            store.put(payload(seed))
        store.close()
        with (folder / "cache.db").open("r+b") as file:
            file.seek(start * 4096)
            file.write(os.urandom(4096))
        with contextlib.suppress(StoreError):
            store = DiskStore(folder)
            for seed in range(8):
                holds(store, seed)
            store.put(payload(1))
            store.close()


def test_network_shares_are_refused_with_advice(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "23 22 0:21 / /data/my\\040share rw - nfs4 host:/x rw\n"
        "24 23 0:22 / /data/my\\040share/local rw - tmpfs tmpfs rw\n"
    )
    assert file_system(Path("/data/my share/a"), mounts) == "nfs4"
    assert file_system(Path("/data/my share/local/a"), mounts) == "tmpfs"
    assert file_system(Path("/data"), mounts) == "ext4"
    assert file_system(Path("/data"), tmp_path / "none") is None
    with mounts.open("ab") as file:  # whatever the encoding
        file.write(b"25 22 0:23 / /data/M\xfcnchen rw - nfs4 host:/y rw\n")
        file.write("26 22 0:24 / /data/Zürich rw - nfs4 host:/z rw\n27 short - \n".encode())
    assert file_system(Path(os.fsdecode(b"/data/M\xfcnchen/a")), mounts) == "nfs4"
    assert file_system(Path("/data/Zürich/a"), mounts) == "nfs4"
    assert file_system(Path("/data"), mounts) == "ext4"
    refuse_network_share(Path("/data"), mounts)
    with pytest.raises(StoreError, match=r"network share.*file://"):
        refuse_network_share(Path("/data/my share/a"), mounts)


@pytest.mark.parametrize("kind", ["9p", "virtiofs", "fuse", "fuse.unheard_of"])
def test_what_may_be_a_networks_file_system_goes_without_shared_memory(
    tmp_path, monkeypatch, caplog, kind
):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw - {kind} /dev/vda rw\n")
    monkeypatch.setattr(filesystem.file_system, "__defaults__", (mounts,))
    monkeypatch.setattr(filesystem.shares_memory, "__defaults__", (mounts,))
    store = DiskStore(tmp_path / "chunks")
    assert kind in caplog.text
    for seed in range(3):
        store.put(payload(seed))
    assert all(holds(store, seed) for seed in range(3))
    assert {path.name for path in store.directory.glob("cache.db*")} == {"cache.db"}
    store.close()


@pytest.mark.parametrize("kind", ["nfs4", "fuse.ceph-fuse", "fuse.mountpoint-s3"])
def test_networks_are_refused(tmp_path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw - {kind} host:/x rw\n")
    with pytest.raises(StoreError, match="network share"):
        refuse_network_share(tmp_path, mounts)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="no mount table")
def test_the_file_system_of_a_folder_is_found(tmp_path):
    with small_disk(tmp_path / "small", 2**20) as disk:
        assert file_system(disk / "chunks") == "tmpfs"
