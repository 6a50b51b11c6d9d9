"""Shared stores that hang, lie or send too much: a chunk or none, in time, and in little memory."""

from __future__ import annotations

import itertools
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

from a3_engine import StoreOptions
from a3_engine.chunks.payload import Payload
from a3_engine.chunks.tiers import open_store
from tests.store.servers import peer
from tests.store.stored import chunk, header, holds, payload

TIMEOUT_S, SPARE_S = 0.5, 3.0  # of a call; of a busy machine
MOST_MEMORY = 40 * 2**20
Serve = Callable[[socket.socket], None]
GROUP = payload(1).to_bytes()


def _says(reply: bytes, times: int = 1) -> Serve:
    """The same reply to each command."""

    def serve(connection: socket.socket) -> None:
        while received := connection.recv(65536):
            connection.sendall(reply * times * (1 + received.count(b"\r\n*")))

    return serve


def _floods(start: bytes, more: bytes) -> Serve:
    """A reply without an end."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(start)
        for _ in itertools.repeat(None):
            connection.sendall(more * 4096)

    return serve


def _drips(reply: bytes, pause_s: float) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        for byte in itertools.cycle(reply):
            connection.sendall(bytes([byte]))
            time.sleep(pause_s)

    return serve


def _stops(reply: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(reply)

    return serve


def _holds(group: bytes, length: int | None = None) -> Serve:
    """A server that knows the commands of a read, and answers them with this layer group."""

    def serve(connection: socket.socket) -> None:
        said = len(group) if length is None else length
        while received := connection.recv(65536):
            for command in (b"HLEN", b"HSTRLEN", b"HMGET", b"EXISTS", b"CLIENT", b"HELLO"):
                for _ in range(received.upper().count(b"\r\n" + command + b"\r\n")):
                    answer = {
                        b"HLEN": b":1\r\n",
                        b"HSTRLEN": b":%d\r\n" % min(said, len(GROUP)),
                        b"HMGET": b"*1\r\n$%d\r\n%s\r\n" % (said, group),
                        b"EXISTS": b":1\r\n",
                        b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
                    }.get(command, b"+OK\r\n")
                    connection.sendall(answer)

    return serve


def peers() -> Iterator[tuple[str, Serve]]:
    yield "silent", lambda connection: time.sleep(30)
    yield "closes", lambda connection: None
    for reply in (
        *(b"+OK\r\n", b":5\r\n", b":-1\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"$0\r\n\r\n"),
        *(b"-ERR no\r\n", b"-MOVED 1 127.0.0.1:1\r\n", b"-LOADING\r\n", b"-NOAUTH\r\n", b"_\r\n"),
        *(b"nonsense\r\n", b"\0\r\n", b":not a number\r\n", b"$-5\r\n", b"*1\r\n*1\r\n:1\r\n"),
    ):
        yield f"says {reply!r}", _says(reply)
        yield f"stops in {reply!r}", _stops(reply[:-2])
    yield "says too often", _says(b":1\r\n", 1000)
    for start, more in (
        (b"$99999999999\r\n", b"x"),
        (b":", b"1"),
        (b"+", b"x"),
        (b"-ERR ", b"x"),
        (b"*1000000000\r\n", b":1\r\n"),
        (b"", b"*1\r\n"),
        (b"*2000000000\r\n", b"$-1\r\n"),
    ):
        yield f"floods {start[:5]!r} {more!r}", _floods(start, more)
        yield f"drips {start[:5]!r} {more!r}", _drips(start + more, 0.05)
    yield "another's chunk", _holds(payload(2).to_bytes())
    yield "another content", _holds(Payload.of(chunk(2), header(2)).to_bytes())
    yield "a cut chunk", _holds(GROUP[:-7])
    yield "a flipped bit", _holds(GROUP[:-7] + b"\x7f" + GROUP[-6:])
    yield "pickles", _holds(b"\x80\x04N.")
    yield "a lie about its length", _holds(b"x" * 10**6, 10**9)
    yield "nothing", _holds(b"")


def attack(folder: Path, say: Callable[[str], object] = lambda line: None, step: int = 1) -> int:
    """Ask each, or each ``step``-th, for a chunk, and store one; returns how many there were."""
    count = 0
    with peer(_holds(GROUP)) as port:  # so that those below are refused for what they send
        store = open_store(folder / "sound", options=StoreOptions(f"redis://127.0.0.1:{port}/0"))
        assert holds(store, 1)
        store.close()
    for name, serve in itertools.islice(peers(), 0, None, step):
        with peer(serve) as port:
            url = f"redis://127.0.0.1:{port}/0"
            store = open_store(folder / f"{count}", options=StoreOptions(url, timeout=TIMEOUT_S))
            tracemalloc.start()
            began = time.monotonic()
            assert not holds(store, 1), name
            store.put(payload(5), "tag")
            seconds = time.monotonic() - began
            time.sleep(0.2)  # what was left alone may still be reading
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            say(f"{name}: {seconds:.1f} s, {most / 2**20:.1f} MiB")
            assert seconds < 3 * TIMEOUT_S + SPARE_S, f"{name} took {seconds:.1f} s"
            assert most < MOST_MEMORY, f"{name} took {most} bytes"
            assert holds(store, 5), name
            assert store.evict("tag") == {header(5).key}, name
            store.close()
        count += 1
    return count
