"""What may be wrong around a store, found without changing it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from a3_engine.chunks.fingerprint import FORMAT_VERSION
from a3_engine.chunks.payload import DamagedPayload, read_header
from a3_engine.chunks.store import StoreOptions
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.filesystem import NETWORK, file_system
from a3_engine.chunks.tiers.remote import RemoteTier
from a3_engine.errors import StoreError

LOW = 2**30  # bytes of free space


class Finding(NamedTuple):
    """One thing looked at, and whether it is as it should be."""

    good: bool
    text: str


def check_model(cache_dir: Path, url: str | None = None) -> list[Finding]:
    """Look at the folder, its file system, the index, the entries, and the shared store."""
    folder = cache_dir / "chunks"
    if not folder.exists():
        return [
            Finding(False, f"{folder} does not exist yet: nothing was stored there"),
            *_far(url),
        ]
    kind = file_system(folder)
    findings = [
        Finding(kind not in NETWORK, f"file system: {kind or 'unknown'}"),
        _permissions(folder),
        _space(folder),
    ]
    try:
        store = DiskStore(folder, secret=StoreOptions().secret, readonly=True)
    except StoreError as error:
        return [*findings, Finding(False, str(error)), *_far(url)]
    findings += _entries(store)
    try:
        problems = store.verify(fix=False)
        text = f"{len(problems)} damaged entries; 'a3 cache verify --fix' removes them"
        findings.append(Finding(not problems, text if problems else "all checksums agree"))
    except (StoreError, sqlite3.Error) as error:
        findings.append(Finding(False, str(error)))
    store.close()
    return [*findings, *_far(url)]


def _permissions(folder: Path) -> Finding:
    found = folder.stat()
    mode = stat.S_IMODE(found.st_mode)
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return Finding(
        mine and mode & 0o077 == 0, f"folder: mode {mode:o}, {'' if mine else 'not '}yours"
    )


def _space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    return Finding(free >= LOW, f"free space: {free / 2**30:.1f} GiB")


def _entries(store: DiskStore) -> list[Finding]:
    versions: Counter[int] = Counter()
    for _, path in store.entries():
        try:
            versions[read_header(path).version] += 1
        except DamagedPayload:
            versions[0] += 1
    foreign = sum(versions.values()) - versions[FORMAT_VERSION]
    stats = store.stats()
    return [
        Finding(True, f"entries: {stats.entries}, {stats.nbytes / 2**20:.1f} MiB"),
        Finding(foreign == 0, f"entries of another format: {foreign}; no request finds them"),
    ]


def _far(url: str | None) -> list[Finding]:
    if url is None:
        return []
    options = StoreOptions(url)
    try:
        tier = RemoteTier.open(url, timeout=options.timeout, secret=options.secret)
    except StoreError as error:
        return [Finding(False, str(error))]
    reachable = tier.reachable()
    tier.close()
    return [Finding(reachable, f"shared store: {'answers' if reachable else 'away'}")]
