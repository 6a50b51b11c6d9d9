"""A folder or bucket behind a URL, by fsspec: one object a chunk, an empty one for each tag."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable

from a3_engine.errors import StoreError

KEY = re.compile(r"[0-9a-f]{64}")


class ObjectBlobs:
    """``URL/ab/KEY`` and ``URL/tags/TAG'S SHA256/KEY``."""

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
            raise StoreError(f"The shared store cannot be opened: {error}") from error

    def read(self, key: str) -> list[bytes] | None:
        try:
            return [self._fs.cat_file(self._path(key))]
        except FileNotFoundError:
            return None

    def write(self, key: str, parts: list[bytes]) -> None:
        self._pipe(self._path(key), b"".join(parts))

    def contains(self, keys: list[str]) -> set[str]:
        return {key for key in keys if self._fs.exists(self._path(key))}

    def mark(self, tag: str, keys: Iterable[str]) -> None:
        for key in keys:
            self._pipe(f"{self._tag(tag)}/{key}", b"")

    def take(self, tag: str) -> set[str]:
        try:
            marks = self._fs.ls(self._tag(tag), detail=False)
        except FileNotFoundError:
            return set()
        self._fs.rm(self._tag(tag), recursive=True)
        names = {str(mark).rpartition("/")[2] for mark in marks}
        return {name for name in names if KEY.fullmatch(name)}

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

    def close(self) -> None:
        pass

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}"

    def _tag(self, tag: str) -> str:
        return f"{self._root}/tags/{hashlib.sha256(tag.encode()).hexdigest()}"

    def _pipe(self, path: str, content: bytes) -> None:
        # A reader that comes in the middle finds a cut payload, which is a miss.
        with contextlib.suppress(NotImplementedError):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, content)
