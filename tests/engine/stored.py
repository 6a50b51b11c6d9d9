"""Small chunks for the tests of the store; each seed has its own content and key."""

from __future__ import annotations

from pathlib import Path

import torch

from a3_engine.chunks.codec import ChunkKV, Header
from a3_engine.chunks.store import DiskStore


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


def payloads(store: DiskStore) -> list[Path]:
    return sorted(store.directory.glob("**/*.val"), key=lambda path: path.stat().st_mtime_ns)
