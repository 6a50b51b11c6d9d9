"""Troubles that a store may have."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3_engine import StoreError
from a3_engine.chunks.tiers.disk import DiskStore
from tests.store.stored import holds, payload, payloads


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own; skips where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def locked_index(folder: Path, seconds: float, patience: float) -> dict[str, float]:
    """Hold the index's write lock, and get and put meanwhile."""
    store = DiskStore(folder / "chunks", lock_timeout=patience)
    store.put(payload(1))
    store.put(payload(2))
    lock = sqlite3.connect(folder / "chunks" / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert holds(store, 1)
    assert holds(store, 2)
    reads = time.monotonic() - started
    with pytest.raises(StoreError, match="locked"):
        store.put(payload(3))
    waited = time.monotonic() - started - reads
    time.sleep(max(0.0, seconds - (time.monotonic() - started)))
    lock.execute("ROLLBACK")
    lock.close()
    assert len(payloads(store)) == 2
    store.put(payload(3))
    assert all(holds(store, seed) for seed in (1, 2, 3))
    store.close()
    assert reads < patience / 2
    return {"locked": seconds, "two reads took": round(reads, 3), "a put waited": round(waited, 1)}
