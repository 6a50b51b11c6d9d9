"""A shared folder behind ``file://``: one file a chunk, two empty ones for each tag.

Others may write there too. No link is followed, in the folder's own folders either; what is written
is a new file that takes the name at once; and no more is read than a chunk can have.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

from a3_engine.chunks.tiers.objects import KEY, tag_name
from a3_engine.errors import StoreError

SHARED = 0o022  # whoever lets others write into the folder shares its files with them


class FolderBlobs:
    """``FOLDER/ab/KEY``; ``FOLDER/tags/TAG'S SHA256/KEY``, ``FOLDER/tagged/KEY/TAG'S SHA256``."""

    group_bytes = 2**62  # one file, whatever its size

    def __init__(self, url: str) -> None:
        self._root = Path(url.partition("://")[2]).expanduser()
        if not self._root.is_absolute():
            raise StoreError(
                "The shared store cannot be opened: write file:/// and a whole path, as in "
                "file:///mnt/share/kv."
            )

    def read(self, key: str, most: int) -> list[bytes] | None:
        path = self._path(key[:2], key)
        if path is None:
            return None
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with open(handle, "rb") as file:
            plain = stat.S_ISREG(os.fstat(handle).st_mode)
            return [file.read(most + 1)] if plain else None

    def write(self, key: str, parts: list[bytes]) -> None:
        self._write((key[:2], key), b"".join(parts))

    def contains(self, keys: list[str]) -> set[str]:
        paths = {key: self._path(key[:2], key) for key in keys}
        return {key for key, path in paths.items() if path is not None and path.is_file()}

    def mark(self, tag: str, keys: Iterable[str]) -> None:
        for key in keys:
            self._write(("tags", tag_name(tag), key), b"")
            self._write(("tagged", key, tag_name(tag)), b"")

    def take(self, tag: str, also: set[str]) -> set[str]:
        keys = {key for key in self._names("tags", tag_name(tag)) if KEY.fullmatch(key)}
        for key in keys:
            self._remove("tags", tag_name(tag), key)
        for key in keys | also:
            self._remove("tagged", key, tag_name(tag))
        return {key for key in keys | also if not self._names("tagged", key)}

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._remove(key[:2], key)

    def close(self) -> None:
        pass

    def _path(self, *names: str) -> Path | None:
        """Where something is; None where a link or no folder is on the way there."""
        folder = self._root
        for name in names[:-1]:
            folder = folder / name
            if not _is_folder(folder):
                return None
        return folder / names[-1]

    def _write(self, names: tuple[str, ...], content: bytes) -> None:
        mode = 0o600
        if self._root.exists() and (asked := self._root.stat().st_mode & 0o777) & SHARED:
            mode = asked & 0o666
        folder_mode = mode | (mode & 0o444) >> 2  # who may read may enter
        self._root.mkdir(parents=True, mode=0o700, exist_ok=True)
        folder = self._root
        for name in names[:-1]:
            folder = folder / name
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                folder.chmod(folder_mode)
            if not _is_folder(folder):
                raise OSError(f"{folder} is not a folder, or a link to one")
        made = folder / f".{uuid.uuid4().hex}"
        handle = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)
            made.chmod(mode)
            made.replace(folder / names[-1])
        except OSError:
            made.unlink(missing_ok=True)
            raise

    def _names(self, *names: str) -> set[str]:
        folder = self._path(*names)
        if folder is None or not _is_folder(folder):
            return set()
        return {name for name in os.listdir(folder) if not name.startswith(".")}

    def _remove(self, *names: str) -> None:
        if (path := self._path(*names)) is not None:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                path.unlink()


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
