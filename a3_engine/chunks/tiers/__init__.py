"""Where chunks are kept: one file a tier, fastest first: memory, disk, remote."""

from __future__ import annotations

from pathlib import Path

from a3_engine.chunks.store import ChunkStore, StoreOptions
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.memory import MemoryTier
from a3_engine.chunks.tiers.remote import RemoteTier
from a3_engine.chunks.tiers.tiered import TieredStore

__all__ = ["DiskStore", "MemoryTier", "RemoteTier", "TieredStore", "open_store"]


def open_store(
    directory: Path,
    size_limit: int | None = None,
    options: StoreOptions | None = None,
    *,
    pin: bool = False,
) -> DiskStore | TieredStore:
    """The local folder, with what the options put around it.

    Parameters
    ----------
    pin : bool
        Whether chunks in memory are read by a GPU; see :class:`MemoryTier`.

    Raises
    ------
    StoreError
        The folder cannot be used, or a URL needs a package that is not installed.
    """
    options = options or StoreOptions()
    disk = DiskStore(directory, size_limit, secret=options.secret)
    tiers: list[ChunkStore] = [disk]
    if options.memory_limit:
        tiers.insert(0, MemoryTier(options.memory_limit, pin=pin))
    if options.url:
        tiers.append(RemoteTier.open(options.url, timeout=options.timeout, secret=options.secret))
    return disk if len(tiers) == 1 else TieredStore(tiers, local=disk)
