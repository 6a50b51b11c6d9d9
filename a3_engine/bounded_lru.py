"""The things used last, bounded by number or by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from a3_engine.processes import Lock

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedLRU(Generic[Key, Value]):
    """A map that drops what was used longest ago; safe to use from threads.

    Parameters
    ----------
    max_items : int or None
        Unbounded where None.
    max_bytes : int or None
        The same, of all values together. A value that is larger by itself is not kept.
    nbytes : callable
        The bytes of one value.
    """

    def __init__(
        self,
        max_items: int | None = None,
        max_bytes: int | None = None,
        nbytes: Callable[[Value], int] = lambda value: 0,
    ) -> None:
        self.max_items, self.max_bytes, self._of = max_items, max_bytes, nbytes
        self._lock = Lock()
        self._items: OrderedDict[Key, Value] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._nbytes

    def keys(self) -> set[Key]:
        """What is kept now; asking counts as no use."""
        with self._lock:
            return set(self._items)

    def get(self, key: Key) -> Value | None:
        """What is kept under a key, used last from now on; None where nothing is."""
        with self._lock:
            if (value := self._items.get(key)) is not None:
                self._items.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Keep a value in place of what was there, and drop what there is no room for."""
        with self._lock:
            self._remove(key)
            size = self._of(value)
            if self.max_bytes is not None and size > self.max_bytes:
                return
            self._items[key] = value
            self._nbytes += size
            while self._too_much():
                self._remove(next(iter(self._items)))

    def discard(self, keys: Iterable[Key]) -> None:
        """Drop these, where they are kept."""
        with self._lock:
            for key in keys:
                self._remove(key)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._items.clear()
            self._nbytes = 0

    def _too_much(self) -> bool:
        items, nbytes = self.max_items, self.max_bytes
        return (items is not None and len(self._items) > items) or (
            nbytes is not None and self._nbytes > nbytes
        )

    def _remove(self, key: Key) -> None:
        if (value := self._items.pop(key, None)) is not None:
            self._nbytes -= self._of(value)
