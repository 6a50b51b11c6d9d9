"""A store shared with others: who may read and write there, and what it may do to its users."""

from __future__ import annotations

import os
import stat
import time
import tracemalloc
from pathlib import Path

import pytest

from a3_engine import A3Engine, StoreError, StoreOptions
from a3_engine.chunks.archive import import_chunks
from a3_engine.chunks.payload import Payload
from a3_engine.chunks.tiers import open_store
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.redis import RedisBlobs
from a3_engine.chunks.tiers.remote import RemoteTier
from a3_engine.cli import main
from tests.store.stored import chunk, header, holds, payload
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def share(tmp_path: Path) -> Path:
    return tmp_path / "share"


def tier(share: Path, **options) -> RemoteTier:
    return RemoteTier.open(f"file://{share}", **{"timeout": 5, "secret": None, **options})


def modes(share: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in share.rglob("*") if path.is_file()}


@pytest.mark.parametrize("made", [None, 0o755, 0o700])
def test_a_shared_folder_is_its_owners_alone(share, made):
    """KV is as secret as its text, which can be read back from it."""
    before = os.umask(0o022)
    try:
        if made is not None:
            share.mkdir()
            share.chmod(made)
        tier(share).put(payload(1), "doc")
    finally:
        os.umask(before)
    assert modes(share) == {0o600}
    assert made is not None or stat.S_IMODE(share.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_shares_its_files_with_them(share):
    share.mkdir()
    share.chmod(0o770)
    tier(share).put(payload(1), "doc")
    assert modes(share) == {0o660}
    assert {stat.S_IMODE(p.stat().st_mode) for p in share.rglob("*") if p.is_dir()} == {0o770}


def test_no_link_in_a_shared_folder_is_followed(share, tmp_path):
    """Neither a file's nor a folder's, to read, to write or to remove what it leads to."""
    key, victim, outside = header(1).key, tmp_path / "victim", tmp_path / "outside"
    content = payload(1).to_bytes()
    victim.write_bytes(content)
    outside.mkdir()
    (share / key[:2]).mkdir(parents=True)
    (share / key[:2] / key).symlink_to(victim)
    assert not holds(tier(share), 1)
    tier(share).put(payload(1))
    assert victim.read_bytes() == content
    assert not (share / key[:2] / key).is_symlink()
    assert holds(tier(share), 1)
    for name in (key[:2], "tags", "tagged"):
        folder = share / name
        if folder.exists():
            folder.rename(tmp_path / f"moved {name}")
        folder.symlink_to(outside)
    (outside / key).write_bytes(payload(1).to_bytes())
    store = tier(share)
    store.put(payload(1), "doc")
    assert not holds(store, 1)
    store.evict("doc")
    store.discard([key])
    assert [path.name for path in outside.iterdir()] == [key]


def test_no_more_is_read_than_a_chunk_can_have(share, tmp_path):
    key, size = header(1).key, 300 * 2**20
    tier(share).put(payload(1))
    os.truncate(share / key[:2] / key, size)
    tracemalloc.start()
    assert not holds(tier(share), 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < size / 20
    os.mkfifo(share / key[:2] / "pipe")
    (share / key[:2] / "pipe").replace(share / key[:2] / key)
    started = time.monotonic()
    assert not holds(tier(share), 1)
    assert time.monotonic() - started < 2


@pytest.mark.usefixtures("socket_enabled")
def test_no_more_is_read_from_redis_than_a_chunk_can_have(tmp_path):
    import redis

    from tests.store.servers import redis_server

    with redis_server(tmp_path) as url:
        client, name = redis.Redis.from_url(url), f"a3:kv:{header(1).key}"
        client.hset(name, "0", b"x" * 50 * 2**20)
        store = RemoteTier.open(url, timeout=20, secret=None)
        tracemalloc.start()
        assert not holds(store, 1)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("start", "more"),
    [(b"$99999999999\r\n", b"x"), (b"*1000000000\r\n", b":1\r\n"), (b":", b"1"), (b"-ERR ", b"x")],
)
@pytest.mark.usefixtures("socket_enabled")
def test_a_redis_that_floods_is_left(start, more):
    """Whatever it claims to send: reading ends, also after the call's deadline."""
    from tests.store.servers import peer

    def serve(connection) -> None:
        connection.recv(4096)
        connection.sendall(start)
        while True:
            connection.sendall(more * 4096)

    with peer(serve) as port:
        blobs = RedisBlobs(f"redis://127.0.0.1:{port}/0", 60.0)
        tracemalloc.start()
        with pytest.raises(ValueError, match="more than any answer"):
            blobs.read("0" * 64, 2000)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@127.0.0.1:1/0",
        f"redis://user:{SECRET}@127.0.0.1:1",
        f"redis://127.0.0.1:1?password={SECRET}",
        f"redis://127.0.0.1:{SECRET}/0",
        f"nonsense://{SECRET}@bucket/kv",
        f"redis://{SECRET}@host:port/x",
    ],
)
@pytest.mark.usefixtures("socket_enabled")
def test_no_password_is_shown(url, tmp_path, caplog, capsys):
    options = StoreOptions(url, timeout=0.5)
    said = [repr(options)]
    try:
        store = open_store(tmp_path / "chunks", options=options)
        store.put(payload(1))
        said += [repr(store.stats()), str(store._tiers[-1].stats())]
        store.close()
    except StoreError as error:
        said.append(str(error))
    main(["cache", "doctor", "--store", url, "--cache-dir", str(tmp_path)])
    out = capsys.readouterr()
    said += [caplog.text, out.out, out.err]
    # A port that is none is no secret, but for who has typed a password there.
    assert all(SECRET not in text for text in said if "127.0.0.1:" + SECRET not in url)


@pytest.mark.parametrize("secret", ["", " " * 16, "short", "\t" * 20 + "x"])
def test_an_empty_secret_is_refused(secret, monkeypatch, tmp_path):
    """As an unset variable gives in a compose file: nobody would know that there is none."""
    monkeypatch.setenv("A3_STORE_SECRET", secret)
    with pytest.raises(ValueError, match="A3_STORE_SECRET"):
        A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=tmp_path)


# What others give one to run, to believe or to look at


def test_an_archive_replaces_nothing(tmp_path, capsys):
    """A sound payload of a known chunk with other content."""
    store = DiskStore(tmp_path / "chunks")
    store.put(payload(1))
    theirs = DiskStore(tmp_path / "theirs" / "chunks")
    theirs.put(Payload.of(chunk(2), header(1)))
    theirs.put(payload(3))
    theirs.close()
    archive = tmp_path / "archive.tar"
    main(["cache", "export", str(archive), "--cache-dir", str(tmp_path / "theirs")])
    assert import_chunks(store, archive) == (2, [])
    assert holds(store, 1)
    assert holds(store, 3)
    capsys.readouterr()
    main(["cache", "import", str(archive), "--cache-dir", str(tmp_path / "other")])
    assert "unsigned" in capsys.readouterr().out


@pytest.mark.parametrize("tag", ["\x1b]0;x\x07", "a\nkey  1  b", "\x9b31m", "‮txt", "tag\r"])
def test_a_tag_cannot_speak_to_the_terminal(tmp_path, capsys, tag):
    store = DiskStore(tmp_path / "chunks")
    store.put(payload(1), tag)
    store.close()
    main(["cache", "ls", "--cache-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert out.isascii()
    assert out.rstrip("\n").isprintable()


def test_doctor_and_verify_change_nothing(tmp_path):
    store = DiskStore(tmp_path / "chunks")
    store.put(payload(1))
    store.close()
    orphan = tmp_path / "chunks" / "ab" / "cd" / f"{'e' * 28}.val"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half")
    (tmp_path / "chunks").chmod(0o755)
    for command in ("doctor", "verify"):
        main(["cache", command, "--cache-dir", str(tmp_path)])
        assert orphan.exists()
        assert stat.S_IMODE((tmp_path / "chunks").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["ChatA3", "A3LLM"])
def test_nobody_is_asked_to_run_a_models_code(tmp_path, monkeypatch, name):
    """Constructing runs nothing and asks nothing; the first use refuses."""
    import json

    import a3_integrations.langchain as langchain

    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = {"model_type": "own", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(sprung)!r}, 'w')\n")

    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    llm = getattr(langchain, name)(model=str(folder), cache_dir=str(tmp_path))
    with pytest.raises(Exception, match=r"trust_remote_code|loaded"):
        llm.invoke("Who?")
    assert not sprung.exists()
