"""Archives that lie, made by kind and place: none gives a chunk that it should not, or a file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from a3_engine import StoreError
from a3_engine.chunks.archive import import_chunks
from a3_engine.chunks.payload import Payload
from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import chunk, header, holds, payload

MOST_MEMORY = 40 * 2**20
GOOD = payload(1).to_bytes()
NAME = f"{header(1).key}.safetensors"
TEXTS: dict[str, Any] = {"tags": {header(1).key: ["doc"]}, "texts": []}


def _tar(*members: tuple[tarfile.TarInfo | str, bytes], texts: object = TEXTS, **how: Any) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", **how) as tar:
        said = [("texts.json", json.dumps(texts).encode())] if texts is not None else []
        for info, content in [*members, *said]:
            member = tarfile.TarInfo(info) if isinstance(info, str) else info
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


def _typed(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(NAME)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def _sparse(size: int) -> bytes:
    member = tarfile.TarInfo(NAME)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                          "GNU.sparse.name": NAME, "GNU.sparse.realsize": str(size)}  # fmt: skip
    return _tar((member, GOOD), format=tarfile.PAX_FORMAT)


def _pax(name: str, value: str) -> bytes:
    member = tarfile.TarInfo(NAME)
    member.pax_headers = {name: value}
    return _tar((member, GOOD), format=tarfile.PAX_FORMAT)


def archives(outside: Path) -> Iterator[tuple[str, bytes]]:
    """By name; at most chunk 1 can come out of one, and only with its own content."""
    sound = _tar((NAME, GOOD))
    rng = random.Random(0)
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"K", b"x", b"g", b"Z"):
        with contextlib.suppress(tarfile.TarError, ValueError):
            yield f"type {kind!r}", _tar((_typed(kind), b""))
    for name in (
        *(
            "../x",
            str(outside / "x"),
            "..\\x",
            "a/../../x",
            "",
            ".",
            "texts.json/",
            "C:\\x",
            "x" * 5000,
        ),
        *(header(2).key + ".safetensors", f"{header(1).key}.SAFETENSORS", f"./{NAME}", "\udc80"),
    ):
        yield f"name {name[:20]!r}", _tar((name, GOOD), format=tarfile.GNU_FORMAT)
    for place in range(8):
        yield f"cut at {place}", sound[: 1 + len(sound) * place // 8]
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound) // 2)] ^= 0xFF
        yield f"flipped {place}", bytes(damaged)
    for texts in (
        *(None, [], {}, 5, {"tags": [], "texts": {}}, {"tags": {"k": 5}, "texts": [[[]]]}),
        *({"tags": {"\ud800": ["\ud800"]}, "texts": [["e", "k", ["h", 1, "x", 2**70]]]},),
        *({"tags": {header(9).key: [None, [], {}]}, "texts": ["text"] * 1000},),
    ):
        yield f"texts {str(texts)[:20]}", _tar((NAME, GOOD), texts=texts)
    deep = b"[" * 100_000
    yield "deep texts", _tar((NAME, GOOD), ("texts.json", deep), texts=None)
    for size in (2**31, 2**40, 2**63):
        yield f"sparse {size}", _sparse(size)
        yield f"pax size {size}", _pax("size", str(size))
    odd = {"path": "../../x", "linkpath": "/etc", "size": "-1", "mtime": "nan"}
    for name, value in odd.items():
        yield f"pax {name}", _pax(name, value)
    yield "gzip", gzip.compress(b"\0" * 10**7)
    yield "bzip2", bz2.compress(b"\0" * 10**7)
    yield "twice", _tar((NAME, Payload.of(chunk(2), header(1)).to_bytes()), (NAME, GOOD))
    yield "many", _tar(*[(f"{n:064x}.safetensors", b"") for n in range(3000)])
    yield "nothing", b""
    yield "zeros", b"\0" * 10**6


def attack(folder: Path, say: Callable[[str], object] = lambda line: None) -> int:
    """Import each; returns how many there were."""
    store = DiskStore(folder / "chunks")
    store.put(payload(3), "kept")
    outside = {path for path in folder.parent.rglob("*") if not path.is_relative_to(folder)}
    count = 0
    for name, content in archives(folder.parent):
        count += 1
        archive = folder / "archive.tar"
        archive.write_bytes(content)
        tracemalloc.start()
        try:
            found, refused = import_chunks(store, archive)
            say(f"{name}: {found} taken over, {len(refused)} refused")
        except StoreError as error:
            say(f"{name}: {error}")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < MOST_MEMORY, f"{name} took {most} bytes"
        assert holds(store, 3), name
        assert not holds(store, 2), name
        if "twice" not in name:  # a whole payload of that key, which `holds` would refuse
            holds(store, 1)
        store.discard([header(1).key])
        assert store.stats().entries == 1, name
    assert store.verify() == []
    store.close()
    now = {path for path in folder.parent.rglob("*") if not path.is_relative_to(folder)}
    assert now == outside
    return count
