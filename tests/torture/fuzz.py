"""Mutated payloads and index rows on the way in: a miss, or the very chunk; nothing else."""

from __future__ import annotations

import json
import logging
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import torch

from a3_engine.chunks.codecs import CODECS
from a3_engine.chunks.payload import DamagedPayload, Payload, open_bytes
from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import chunk, header, payload

SECRET = b"a secret of the tests"
ODD = [0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1]
COLUMNS = ("key", "raw", "expire_time", "access_time", "size", "mode", "filename", "value", "tag")


def same(found: Payload, original: Payload) -> bool:
    """Equal bit for bit, not-a-numbers included."""
    return found.header == original.header and all(
        torch.equal(found.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in original.tensors.items()
    )


def mutate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, bytes, cuts, splices, lengths, fields of the header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            return bytes(data)
        at = rng.randrange(len(data))
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data += rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 5:
            start = rng.randrange(len(other))
            data[at : at + 16] = other[start : start + 16]
        elif kind == 6:
            data[:8] = rng.choice(ODD).to_bytes(8, "little")
        elif kind == 7:
            data = bytearray(_with_field(bytes(data), rng))
        else:
            data = bytearray(other)
    return bytes(data)


def _with_field(content: bytes, rng: random.Random) -> bytes:
    """A well-formed document with another value somewhere in its header."""
    length = int.from_bytes(content[:8], "little")
    try:
        fields = json.loads(content[8 : 8 + length])
        spot = fields[rng.choice(list(fields))]
        name = rng.choice(list(spot))
        odd = [*ODD, -1, None, "", "F8_E4M3", "BF16", "I64", [], {}, "x" * 100, True, 1e308]
        spot[name] = rng.choice([*odd, [0, 2**62], [0, rng.choice(ODD)], [rng.choice(ODD)] * 4])
        text = json.dumps(fields).encode()
    except (ValueError, TypeError, AttributeError, LookupError):
        return content
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def fuzz_payloads(cases: int, until: float, seed: int = 0) -> Counter[str]:
    """Mutate sealed bytes of every codec and open them, with and without a secret."""
    rng, counts = random.Random(seed), Counter[str]()
    originals = [
        (payload(1, codec=codec), payload(2, codec=codec), secret)
        for codec in CODECS
        for secret in (None, SECRET)
    ]
    sealed = [(p, p.to_bytes(s), q.to_bytes(s), s) for p, q, s in originals]
    while counts["payloads"] < cases and time.monotonic() < until:
        original, content, other, secret = rng.choice(sealed)
        counts["payloads"] += 1
        try:
            found = open_bytes(mutate(content, other, rng), original.header, secret)
        except DamagedPayload:
            counts["payload misses"] += 1
        else:
            assert same(found, original), "a mutated payload gave another chunk"
    return counts


def fuzz_store(folder: Path, cases: int, until: float, seed: int = 0) -> Counter[str]:
    """Mutate files and index rows of a store, then get.

    Outside the folder lies a sound payload of the same key with other content: reading it would
    show as a wrong chunk.
    """
    logger = logging.getLogger("a3_engine")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a warning for each of a hundred thousand
    try:
        return _fuzz_store(folder, cases, until, seed)
    finally:
        logger.setLevel(level)


def _fuzz_store(folder: Path, cases: int, until: float, seed: int) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    store = DiskStore(folder / "chunks")
    original = payload(1)
    canary = folder / "canary.val"
    canary.write_bytes(Payload.of(chunk(9), header(1)).to_bytes())
    before = canary.read_bytes()
    other = payload(2).to_bytes()
    names = [str(canary), "../canary.val", "ab/cd/../../../canary.val", "", ".", "cache.db", "ab"]
    values = [None, b"", b"\x80\x04N.", "text", -1, 0, 3, 2**62, 1.5, float("inf"), *names]
    while sum(counts[kind] for kind in ("files", "rows")) < cases and time.monotonic() < until:
        if store.get(original.header) is None:
            store.discard([original.header.key])
            store.put(original)
        ((_, path),) = [entry for entry in store.entries() if entry[0].key == original.header.key]
        if rng.random() < 0.5:
            counts["files"] += 1
            path.write_bytes(mutate(path.read_bytes(), other, rng))
        else:
            counts["rows"] += 1
            changed = rng.sample(COLUMNS, rng.choice((1, 1, 2)))
            with sqlite3.connect(folder / "chunks" / "cache.db") as db:
                assignments = ", ".join(f"{column} = ?" for column in changed)
                db.execute(f"UPDATE Cache SET {assignments}", [rng.choice(values) for _ in changed])
            db.close()
        found = store.get(original.header)
        if found is None:
            counts["store misses"] += 1
            with sqlite3.connect(folder / "chunks" / "cache.db") as db:
                db.execute("DELETE FROM Cache")
                db.execute("UPDATE Settings SET value = 0 WHERE key IN ('count', 'size')")
            db.close()
        else:
            assert same(found, original), "a mutated store gave another chunk"
    assert canary.read_bytes() == before
    store.verify()
    assert store.verify() == []
    store.close()
    return counts
