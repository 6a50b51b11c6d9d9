"""What belongs to one process: made anew in a forked child, and ended in order at exit.

A child has none of its parent's other threads. A lock that one of them held would stay locked for
ever, and work handed to one of them would never be done.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")

_in_child: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()  # its method
_at_exit: list[Callable[[], None]] = []
_waited_for: weakref.WeakSet[Lock | Entered] = weakref.WeakSet()
_held: dict[int, list[Lock | Entered]] = {}  # by the thread that forks


class Lock:
    """A `threading.Lock` that is free in a forked child, whoever held it before the fork.

    Parameters
    ----------
    around_foreign : bool
        It guards code that has locks of its own, which stay locked in a child: a fork waits for it.
    """

    def __init__(self, *, around_foreign: bool = False) -> None:
        self.renew()
        make_anew_in_child(self.renew)
        if around_foreign:
            _waited_for.add(self)

    def renew(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> Lock:
        self._lock.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


class Entered:
    """Code with locks of its own that many threads may be in; a fork waits until all have left.

    Parameters
    ----------
    leave : callable
        Called before each fork, when nobody is in.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self.renew()
        make_anew_in_child(self.renew)
        _waited_for.add(self)

    def renew(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._forking = 0, False
        self._own = threading.local()

    def __enter__(self) -> None:
        depth = getattr(self._own, "depth", 0)
        if depth == 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._forking)
                self._inside += 1
        self._own.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        self._own.depth -= 1
        if self._own.depth == 0:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def acquire(self) -> None:
        """Let nobody in any more, and wait until all are out."""
        mine = 1 if getattr(self._own, "depth", 0) else 0
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._forking = True
            self._changed.wait_for(lambda: self._inside == mine)
        if not mine:
            self._leave()

    def release(self) -> None:
        with self._changed:
            self._forking = False
            self._changed.notify_all()


class cached_property(Generic[T]):
    """`functools.cached_property` as it is from Python 3.12 on.

    That of 3.11 holds one lock for all objects of a class, which a child would inherit locked.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


def make_anew_in_child(renew: Callable[[], None]) -> None:
    """Call an object's method in every forked child, as long as the object lives."""
    assert isinstance(renew, MethodType)
    _in_child[renew.__self__] = renew.__name__


def end_at_exit(end: Callable[[], None]) -> None:
    """Call this when the program ends: after its own threads, before the interpreter goes.

    What is registered last is called first.
    """
    _at_exit.append(end)


def _wait_for_all() -> None:
    held = _held[threading.get_ident()] = []
    for lock in sorted(_waited_for, key=id):
        lock.acquire()
        held.append(lock)


def _let_go() -> None:
    for lock in _held.pop(threading.get_ident()):
        lock.release()


def _renew_all() -> None:
    _held.clear()
    for owner, renew in list(_in_child.items()):  # objects may go meanwhile
        getattr(owner, renew)()


@atexit.register
def _end_all() -> None:
    while _at_exit:
        _at_exit.pop()()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_all, after_in_parent=_let_go, after_in_child=_renew_all)
