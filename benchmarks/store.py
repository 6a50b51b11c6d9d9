"""A warm read of a stored chunk beside plain safetensors, and the codecs' sizes and speeds.

Usage: python benchmarks/store.py [--rounds 30] [--tokens 512] [--json]

Each round times, one after the other, a copy from the store and a copy from a plain safetensors
file of the same tensors; the page cache is warm. The shape is the demo model's in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from a3_engine import StoreOptions
from a3_engine.chunks.codecs import CODECS
from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.tiers import open_store
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.kv import ChunkKV

SHAPE = (30, 3, 512, 64)  # the demo model's: layers, key-value heads, tokens, head dimension


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=SHAPE[2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = (*SHAPE[:2], options.tokens, SHAPE[3])
    torch.manual_seed(0)
    kv = ChunkKV(*(torch.randn(shape).bfloat16() for _ in range(2)))
    into = ChunkKV(torch.empty_like(kv.keys), torch.empty_like(kv.values))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(reads(Path(folder), kv, into, options.rounds))
        rows += [codec(Path(folder), name, kv, into, options.rounds) for name in CODECS]
    for row in rows:
        print(json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()))


def header_of(kv: ChunkKV, codec: str) -> Header:
    return Header("a" * 64, "benchmark", tuple(kv.keys.shape), str(kv.keys.dtype), codec)


def copy(kv: ChunkKV, into: ChunkKV) -> None:
    """What the engine does with a chunk: every byte into a buffer."""
    into.keys.copy_(kv.keys)
    into.values.copy_(kv.values)


def reads(folder: Path, kv: ChunkKV, into: ChunkKV, rounds: int) -> dict[str, object]:
    """The store, memory and a plain file in turn."""
    header = header_of(kv, "raw")
    plain = folder / "plain.safetensors"
    save_file({"keys": kv.keys, "values": kv.values}, plain)
    disk = DiskStore(folder / "chunks")
    memory = open_store(folder / "memory", options=StoreOptions(memory_limit=2 * kv.nbytes))
    for store in (disk, memory):
        store.put(Payload.of(kv, header))

    def read_plain() -> None:
        with safe_open(plain, framework="pt") as file:
            copy(ChunkKV(file.get_tensor("keys"), file.get_tensor("values")), into)

    def read(store: object) -> None:
        copy(store.get(header).kv(), into)  # type: ignore[attr-defined]

    first = timed(lambda: read(disk))
    times = alternate([read_plain, lambda: read(disk), lambda: read(memory)], rounds)
    medians = [1000 * statistics.median(each) for each in times]
    disk.close()
    memory.close()
    return {
        "tokens": kv.n_tokens,
        "MiB": round(kv.nbytes / 2**20, 2),
        "plain_ms": round(medians[0], 3),
        "store_ms": round(medians[1], 3),
        "memory_ms": round(medians[2], 3),
        "first_read_ms": round(1000 * first, 3),
        "store_to_plain": round(medians[1] / medians[0], 3),
    }


def codec(folder: Path, name: str, kv: ChunkKV, into: ChunkKV, rounds: int) -> dict[str, object]:
    """Size, and times of encoding, putting and reading."""
    header = header_of(kv, name)
    store = DiskStore(folder / name)
    payload = Payload.of(kv, header)
    acts: list[Callable[[], object]] = [lambda: Payload.of(kv, header), lambda: store.put(payload)]
    encode, put = alternate(acts, max(3, rounds // 3))
    (read,) = alternate([lambda: copy(store.get(header).kv(), into)], rounds)  # type: ignore[union-attr]
    store.close()
    return {
        "codec": name,
        "MiB": round(payload.nbytes / 2**20, 2),
        "of_raw": round(payload.nbytes / kv.nbytes, 3),
        "encode_ms": round(1000 * statistics.median(encode), 2),
        "put_ms": round(1000 * statistics.median(put), 2),
        "read_ms": round(1000 * statistics.median(read), 2),
    }


def alternate(acts: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """A B A B …; one round ahead is not counted."""
    times: list[list[float]] = [[] for _ in acts]
    for number in range(rounds + 1):
        for act, seconds in zip(acts, times, strict=True):
            taken = timed(act)
            if number:
                seconds.append(taken)
    return times


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
