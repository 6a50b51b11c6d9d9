"""A store in a folder of its own for each test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3_engine.chunks.tiers.disk import DiskStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "chunks")
    yield store
    store.close()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder where a sync costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
