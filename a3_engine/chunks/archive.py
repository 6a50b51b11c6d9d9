"""Carrying chunks between machines: a plain tar of payloads, checked one by one when it is read.

Nothing of an archive is written under a name that the archive chose: members are read as bytes,
and what they say of themselves decides whether they become entries of the store.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from a3_engine.chunks.known import About, Known
from a3_engine.chunks.payload import DamagedPayload, claim, open_bytes, open_file, read_header
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.chunks.tiers.index import Note
from a3_engine.conversations import TAG
from a3_engine.errors import StoreError

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
TEXTS = "texts.json"
KEY = re.compile("[0-9a-f]{64}")


def export_chunks(
    store: DiskStore,
    archive: Path,
    tag: str | None = None,
    secret: bytes | None = None,
    step: Callable[[], object] = lambda: None,
) -> int:
    """Write the chunks, of one tag where given, and what is known of their texts.

    Turns of conversations stay on this machine unless their tag is given.

    Parameters
    ----------
    step : callable
        Called after each entry.

    Returns
    -------
    int
        Chunks written; damaged ones are left out with a warning.
    """
    tags, count = {}, 0
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w") as tar:
        for row, path in store.entries():
            step()
            own = not any(each.startswith(TAG) for each in row.tags)
            if tag not in row.tags if tag is not None else not own:
                continue
            try:
                payload = open_file(path, read_header(path), secret, hashed=False)
            except DamagedPayload as error:
                logger.warning("Chunk %s is damaged (%s) and left out.", row.key[:12], error)
                continue
            _add(tar, row.key + SUFFIX, payload.to_bytes(secret))
            tags[row.key] = row.tags
            count += 1
        texts = {"tags": tags, "texts": store.text_rows(tag)}
        _add(tar, TEXTS, json.dumps(texts).encode())
    partial.replace(archive)
    return count


def import_chunks(
    store: DiskStore,
    archive: Path,
    secret: bytes | None = None,
    step: Callable[[], object] = lambda: None,
) -> tuple[int, list[str]]:
    """Take over an archive's chunks and texts.

    Returns
    -------
    tuple of int and list of str
        Chunks taken over or there already, and what was refused, with the reason.

    Raises
    ------
    StoreError
        It is no archive, or the store cannot be written.
    """
    count, refused = 0, []
    try:
        limit = archive.stat().st_size
        # A header may claim any size: no more is asked for than the file has.
        with _Bounded(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            texts = _read_texts(tar, limit)
            for member in tar:
                if member.name == TEXTS:
                    continue
                step()
                try:
                    content = _read(tar, member, limit)
                    header = claim(content)
                    if member.name != header.key + SUFFIX:
                        raise DamagedPayload("its name is not its key")
                    payload = open_bytes(content, header, secret)
                except DamagedPayload as error:
                    refused.append(f"{member.name!r}: {error}")
                    continue
                if not store.contains_many([header.key]):  # what is there is not replaced
                    store.put(payload)
                count += 1
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise StoreError(f"{archive} cannot be imported: {error}.") from error
    store.note(_notes(texts))
    return count, refused


def _notes(texts: dict[str, Any]) -> Iterator[Note]:
    """The tags and texts of an archive; what cannot be one is left out."""
    for key, tags in texts["tags"].items():
        for tag in tags if isinstance(tags, list) else [tags]:
            if isinstance(tag, str) and KEY.fullmatch(key):
                yield Note("", key, About(None, tag))
    for row in texts["texts"]:
        match row:
            case [str(engine), str(key), fields] if KEY.fullmatch(key):
                if (known := Known.read(fields)) is not None:
                    yield Note(engine, key, About(known))


class _Bounded(io.FileIO):
    """A file that never makes room for more than it has."""

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left)) or b""


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    # A sparse member claims any size; no other can be larger than the archive.
    if not member.isreg() or member.issparse() or member.size > limit:
        raise DamagedPayload("it is not a plain file, or larger than its archive")
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
    if len(content) != member.size:
        raise DamagedPayload("it is cut")
    return content


def _read_texts(tar: tarfile.TarFile, limit: int) -> dict[str, Any]:
    try:
        texts = json.loads(_read(tar, tar.getmember(TEXTS), limit))
        if not isinstance(texts["tags"], dict) or not isinstance(texts["texts"], list):
            raise ValueError("it has another format")
    except (KeyError, ValueError, TypeError, RecursionError, DamagedPayload) as error:
        raise StoreError(f"The archive has no readable {TEXTS}: {error}.") from error
    return texts
