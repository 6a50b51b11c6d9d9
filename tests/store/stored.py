"""Small chunks for the tests of the store; each seed has its own content and key."""

from __future__ import annotations

from pathlib import Path

import torch

from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.store import ChunkStore
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.kv import ChunkKV


def chunk(seed: int, n_tokens: int = 5, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, n_tokens, 8)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return ChunkKV(keys, values)


def header(
    seed: int, n_tokens: int = 5, dtype: torch.dtype = torch.float32, codec: str = "raw"
) -> Header:
    return Header(f"{seed:064x}", "an engine", (3, 2, n_tokens, 8), str(dtype), codec)


def payload(seed: int, n_tokens: int = 5, codec: str = "raw") -> Payload:
    return Payload.of(chunk(seed, n_tokens), header(seed, n_tokens, codec=codec))


def holds(store: ChunkStore, seed: int, n_tokens: int = 5) -> bool:
    """Whether the store returns this chunk; anything else that it returns is an error."""
    found = store.get(header(seed, n_tokens))
    if found is not None:
        kv, again = found.kv(), chunk(seed, n_tokens)
        assert torch.equal(kv.keys, again.keys)
        assert torch.equal(kv.values, again.values)
    return found is not None


def payloads(store: DiskStore) -> list[Path]:
    return sorted(store.directory.glob("**/*.val"), key=lambda path: path.stat().st_mtime_ns)
