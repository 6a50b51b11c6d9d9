"""The files of a local store, and the only way into them.

diskcache pickles by default, which would let whoever can write the folder run code
(CVE-2025-69872). `SafeDisk` takes only str keys and bytes, reads and removes only plain files
whose names it made, and never unpickles.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_BINARY

from a3_engine.chunks.tiers.filesystem import give_to_owner
from a3_engine.chunks.tiers.mapped_files import Opened

ATTEMPTS = 10
FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")


class UnsafeEntry(Exception):
    """An index row that this store cannot have written."""


class SafeDisk(diskcache.Disk):
    """Str keys, raw bytes, files of our own naming; everything else is refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.opened = Opened()

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"Chunk keys are str, not {type(key).__name__}.")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str):
            raise UnsafeEntry("a key that is not a plain str")
        return key

    def store(
        self, value: Any, read: bool, key: Any = diskcache.UNKNOWN
    ) -> tuple[int, int, str | None, Any]:
        if not isinstance(value, bytes):
            raise TypeError(f"Payloads are bytes, not {type(value).__name__}.")
        name, path = self.filename(key, value)
        name = name.replace(os.sep, "/")
        folder = os.path.dirname(path)
        for attempt in range(ATTEMPTS):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            try:
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                break
            except FileNotFoundError:  # another process has just removed the empty folder
                if attempt == ATTEMPTS - 1:
                    raise
        try:
            with open(file, "wb") as opened:
                opened.write(value)
                opened.flush()
                # The index row that follows reports the chunk as stored: the bytes come first.
                os.fsync(opened.fileno())
            for parent in (folder, os.path.dirname(folder), self._directory):
                _sync_folder(parent)
            give_to_owner(self._directory, path, folder, os.path.dirname(folder))
        except OSError:  # the disk is full: leave nothing behind
            self.remove(name)
            raise
        return len(value), MODE_BINARY, name, None

    def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
        if mode != MODE_BINARY or value is not None:
            raise UnsafeEntry("an entry that is not a file of bytes")
        path = self.path(filename)
        return open(path, "rb") if read else path.read_bytes()

    def remove(self, file_path: str) -> None:
        with contextlib.suppress(UnsafeEntry):
            self._inside(file_path)
            self.opened.forget(file_path)
            super().remove(file_path)

    def path(self, filename: Any) -> Path:
        """Where a row's file is.

        Raises
        ------
        UnsafeEntry
            The name is not one of ours, or what has it is a link, a folder or a device.
        """
        return Path(self.found(filename)[0])

    def found(self, filename: Any) -> tuple[str, os.stat_result | None]:
        """:meth:`path`, and what the system says of the file; None where there is no file."""
        path = self._inside(filename)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return path, None
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeEntry("a file name that belongs to something other than a file")
        return path, found

    def _inside(self, filename: Any) -> str:
        """The path of a name of ours whose folders are real folders of the store."""
        if not isinstance(filename, str) or not FILE_NAME.fullmatch(filename.replace(os.sep, "/")):
            raise UnsafeEntry("a file name outside the store")
        for depth in (2, 5):  # ab, ab/cd
            try:
                parent = os.lstat(f"{self._directory}{os.sep}{filename[:depth]}")
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(parent.st_mode):
                raise UnsafeEntry("a file name that leads outside the store")
        return f"{self._directory}{os.sep}{filename}"

    def files(self) -> set[str]:
        """Names of all payload files, whether the index knows them or not."""
        root = Path(self._directory)
        found = (path.relative_to(root).as_posix() for path in root.glob("??/??/*.val"))
        return {name for name in found if FILE_NAME.fullmatch(name)}


def _sync_folder(folder: str) -> None:
    """Make a new name in a folder survive a power cut, where the system can."""
    with contextlib.suppress(PermissionError, FileNotFoundError):  # Windows; a race with `remove`
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
