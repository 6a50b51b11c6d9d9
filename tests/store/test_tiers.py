"""Memory, disk and shared stores as one: found wherever it is, computed when nobody has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_socket import enable_socket

from a3_engine import A3Engine, StoreError, StoreOptions
from a3_engine.chunks.store import ChunkStore
from a3_engine.chunks.tiers import open_store
from a3_engine.chunks.tiers.memory import MemoryTier
from a3_engine.chunks.tiers.remote import RemoteTier
from tests.store.servers import peer, redis_server, s3_server
from tests.store.stored import header, holds, payload
from tests.tiny import tiny_model, tiny_tokenizer

DOCUMENTS = [
    "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon.",
    "The harbour freezes in January, and no ship leaves it before the ice is broken.",
]
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Started once; a test asks for an address by the kind of store."""
    enable_socket()
    opened: dict[str, str] = {}
    stack = []

    def start(kind: str) -> str:
        if kind not in opened:
            manager = (
                redis_server(tmp_path_factory.mktemp("redis")) if kind == "redis" else s3_server()
            )
            opened[kind] = manager.__enter__()
            stack.append(manager)
        return opened[kind]

    yield start  # type: ignore[misc]
    for manager in stack:
        manager.__exit__(None, None, None)


@pytest.fixture(params=["redis", "s3", "file", "memory"])
def url(request, servers, tmp_path, monkeypatch, socket_enabled) -> str:
    """An empty shared store of each kind."""
    if request.param == "redis":
        import redis

        redis.Redis.from_url(servers("redis")).flushall()
        return servers("redis")
    if request.param == "s3":
        import boto3
        from s3fs import S3FileSystem

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", servers("s3"))
        bucket = f"bucket-{time.time_ns()}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        S3FileSystem.clear_instance_cache()
        return f"s3://{bucket}/kv"
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    return f"memory://shared-{time.time_ns()}"


@pytest.fixture
def machine(url, tmp_path) -> Iterator:
    """Opens the store of another machine each time: a new folder, the same shared store."""
    opened: list[ChunkStore] = []

    def build(**options) -> ChunkStore:
        options = {"timeout": 20.0, **options}
        folder = tmp_path / f"machine {len(opened)}"
        opened.append(open_store(folder, options=StoreOptions(url, **options)))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def test_one_machine_reads_what_another_wrote(machine):
    one, two = machine(), machine()
    assert one.put(payload(1), tag="doc") > 0
    assert not holds(two, 2)
    assert two.contains_many([header(1).key, header(2).key]) == {header(1).key}
    assert two.stats().entries == 0
    assert holds(two, 1)
    assert two.stats().entries == 1


def test_eviction_by_tag_reaches_the_shared_store(machine):
    one, two = machine(), machine()
    for seed, tag in ((1, "a"), (2, "a"), (3, "b"), (4, None)):
        one.put(payload(seed), tag)
    one.retag({header(4).key: "b"})
    assert holds(two, 1)
    assert two.evict("a") == {header(1).key, header(2).key}
    assert two.evict("a") == set()
    three = machine()
    assert [holds(three, seed) for seed in (1, 2, 3, 4)] == [False, False, True, True]
    assert three.evict("b") == {header(3).key, header(4).key}


def test_only_holders_of_the_secret_are_believed(machine, caplog):
    ours, theirs = (machine(secret=secret) for secret in (b"o" * 16, b"t" * 16))
    theirs.put(payload(1))
    assert not holds(ours, 1)
    assert "secret" in caplog.text
    ours.put(payload(1))
    assert holds(machine(secret=b"o" * 16), 1)
    assert not holds(machine(secret=b"t" * 16), 1)


@pytest.mark.usefixtures("socket_enabled")
def test_damaged_layer_groups_are_a_miss(servers):
    import redis

    from a3_engine.chunks.tiers.redis import RedisBlobs

    url = servers("redis")
    client, blobs = redis.Redis.from_url(url), RedisBlobs(url, 5)
    blobs.group_bytes = 1
    tier = RemoteTier(blobs, url, timeout=20, secret=None)
    other = RemoteTier(blobs, url, timeout=20, secret=None)
    tier.put(payload(1))
    name = f"a3:kv:{header(1).key}"
    groups = client.hgetall(name)
    assert sorted(groups) == [b"0", b"1", b"2"]
    assert holds(other, 1)
    for damage in (
        {b"0": groups[b"1"]},
        {b"2": groups[b"2"][:-1]},
        {b"1": b""},
        {b"3": groups[b"2"]},
        {b"x": b"y"},
    ):
        client.hset(name, mapping=damage)
        assert not holds(other, 1)
        client.delete(name)
        client.hset(name, mapping=groups)
    client.hdel(name, "1")
    assert not holds(other, 1)
    tier.put(payload(1))
    assert holds(other, 1)


def test_engines_share_chunks_by_url(url, tmp_path):
    """The second machine computes nothing, and both answer alike."""
    engines = [
        A3Engine.from_pretrained(
            tiny_model("llama"),
            tiny_tokenizer(),
            cache_dir=tmp_path / str(n),
            store=StoreOptions(url, memory_limit=10**6, timeout=20.0),
        )
        for n in range(2)
    ]
    answers = [e.generate("Who sleeps?", chunks=DOCUMENTS, max_new_tokens=4) for e in engines]
    assert [a.report.misses for a in answers] == [2, 0]
    assert answers[0].text == answers[1].text
    for engine in engines:
        engine.close()


# When the shared store is away


def hanging(connection) -> None:
    time.sleep(30)


def dropping(connection) -> None:
    connection.recv(100)
    connection.sendall(b"*2\r\n$1\r\n0\r\n$1000000\r\nhalf a pay")


def dripping(connection) -> None:
    """One byte now and then, within every time-out of a client."""
    connection.recv(100)
    for byte in b"*2\r\n$1\r\n0\r\n$1000000\r\n" + b"x" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.parametrize("serve", [hanging, dropping, dripping, lambda connection: None])
@pytest.mark.usefixtures("socket_enabled")
def test_requests_go_on_without_the_shared_store(tmp_path, caplog, serve):
    """In bounded time, with one warning for the outage, and stored in the folder."""
    with peer(serve) as port:
        options = StoreOptions(f"redis://{HOST}:{port}/0", timeout=0.5)
        store = open_store(tmp_path / "chunks", options=options)
        started = time.monotonic()
        for seed in range(5):
            assert not holds(store, seed)
            assert store.put(payload(seed)) > 0
            assert holds(store, seed)
        assert store.contains_many([header(9).key]) == set()
        assert store.evict("nobody's") == set()
        assert time.monotonic() - started < 5
        assert caplog.text.count("is away") == 1
        store.close()


@pytest.mark.usefixtures("socket_enabled")
def test_an_engine_answers_while_the_shared_store_is_away(tiny_engine, caplog):
    engine = tiny_engine(store=StoreOptions(f"redis://{HOST}:1/0", timeout=0.5))
    alone = tiny_engine()
    for _ in range(2):
        answers = [
            e.generate("Who sleeps?", chunks=DOCUMENTS, max_new_tokens=4) for e in (engine, alone)
        ]
        assert answers[0].text == answers[1].text
    assert "is away" in caplog.text


@pytest.mark.usefixtures("socket_enabled")
def test_a_shared_store_that_comes_back_is_used_again(servers, monkeypatch):
    import a3_engine.chunks.tiers.remote as remote

    monkeypatch.setattr(remote, "LEAVE_ALONE", 0.2)
    tier = RemoteTier.open(servers("redis"), timeout=5, secret=None)
    good, bad = tier._blobs, RemoteTier.open(f"redis://{HOST}:1/0", timeout=5, secret=None)._blobs
    tier._blobs = bad
    assert tier.put(payload(1)) == 0
    tier._blobs = good
    assert tier.put(payload(1)) == 0  # left alone for now
    time.sleep(0.3)
    assert tier.put(payload(1)) > 0
    assert holds(tier, 1)


def test_a_url_that_cannot_be_opened_says_so(tmp_path):
    for url in ("nonsense://bucket", "redis://host:port/x"):
        with pytest.raises(StoreError, match="shared store"):
            open_store(tmp_path, options=StoreOptions(url))
    with pytest.raises(ValueError, match="16 bytes"):
        StoreOptions(secret=b"short")
    with pytest.raises(ValueError, match="timeout"):
        StoreOptions(timeout=0)


def test_the_secret_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("A3_STORE_SECRET", "a secret of this test")
    assert StoreOptions().secret == b"a secret of this test"
    assert "a secret" not in repr(StoreOptions())


# Single flight and memory


def test_threads_fetch_a_chunk_from_the_shared_store_once(tmp_path):
    reads = []

    class Slow(RemoteTier):
        def get(self, expected):
            reads.append(expected.key)
            time.sleep(0.2)
            return super().get(expected)

    shared = RemoteTier.open(f"file://{tmp_path}/shared", timeout=5, secret=None)
    shared.put(payload(1))
    store = open_store(tmp_path / "chunks", options=StoreOptions(f"file://{tmp_path}/shared"))
    store._tiers[-1].__class__ = Slow
    found = []
    threads = [threading.Thread(target=lambda: found.append(holds(store, 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert len(reads) == 1
    store.close()


def test_memory_holds_its_bytes_and_forgets_the_least_recently_used():
    one = payload(0, 100).nbytes
    memory = MemoryTier(3 * one + 10)
    for seed in range(5):
        memory.put(payload(seed, 100))
        assert holds(memory, 0, 100)
        assert memory.stats().nbytes <= memory.size_limit
    assert [holds(memory, seed, 100) for seed in range(5)] == [True, False, False, True, True]
    assert memory.put(payload(7, 1000)) == 0
    memory.put(payload(4, 100))
    assert memory.stats().entries == 3
    memory.discard([header(4).key, header(9).key])
    assert memory.stats().nbytes == 2 * one
    assert memory.get(header(0, 101)) is None


def test_memory_keeps_copies_not_mapped_files(tmp_path):
    store = open_store(tmp_path / "chunks", options=StoreOptions(memory_limit=10**6))
    store.put(payload(1))
    store.close()
    store = open_store(tmp_path / "chunks", options=StoreOptions(memory_limit=10**6))
    assert holds(store, 1)
    for path in Path(tmp_path / "chunks").glob("**/*.val"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert holds(store, 1)  # from memory
    store.discard([header(1).key])
    assert not holds(store, 1)
    store.close()
