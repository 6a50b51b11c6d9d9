"""A folder or bucket behind a URL, by fsspec: one object a chunk, two empty ones for each tag."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable

from a3_engine.chunks.urls import unnamed
from a3_engine.errors import StoreError

KEY = re.compile(r"[0-9a-f]{64}")


class ObjectBlobs:
    """``URL/ab/KEY``; ``URL/tags/TAG'S SHA256/KEY``, ``URL/tagged/KEY/TAG'S SHA256``."""

    group_bytes = 2**62  # one object, whatever its size

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise StoreError(
                "A shared store by URL needs fsspec: pip install 'a3-integrations[remote]'."
            ) from error
        try:
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"The shared store cannot be opened: {unnamed(error, url)}") from error

    def read(self, key: str, most: int) -> list[bytes] | None:
        try:
            return [self._fs.cat_file(self._path(key), start=0, end=most + 1)]
        except FileNotFoundError:
            return None

    def write(self, key: str, parts: list[bytes]) -> None:
        self._pipe(self._path(key), b"".join(parts))

    def contains(self, keys: list[str]) -> set[str]:
        return {key for key in keys if self._fs.exists(self._path(key))}

    def mark(self, tag: str, keys: Iterable[str]) -> None:
        for key in keys:
            self._pipe(f"{self._root}/tags/{tag_name(tag)}/{key}", b"")
            self._pipe(f"{self._root}/tagged/{key}/{tag_name(tag)}", b"")

    def take(self, tag: str, also: set[str]) -> set[str]:
        marks = f"{self._root}/tags/{tag_name(tag)}"
        keys = {key for key in self._names(marks) if KEY.fullmatch(key)}
        if keys:
            self._fs.rm(marks, recursive=True)
        last = set()
        for key in keys | also:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/tagged/{key}/{tag_name(tag)}")
            if not self._names(f"{self._root}/tagged/{key}"):
                last.add(key)
        return last

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

    def close(self) -> None:
        pass

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}"

    def _names(self, folder: str) -> set[str]:
        try:
            found = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return set()
        return {str(path).rstrip("/").rpartition("/")[2] for path in found}

    def _pipe(self, path: str, content: bytes) -> None:
        # A reader that comes in the middle finds a cut payload, which is a miss.
        with contextlib.suppress(NotImplementedError):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, content)


def tag_name(tag: str) -> str:
    """A tag in an object's name: without letters of its own, and of one length."""
    return hashlib.sha256(tag.encode("utf-8", "surrogatepass")).hexdigest()
