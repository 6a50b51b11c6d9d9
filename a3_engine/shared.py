"""One engine for all objects that ask for the same model and store: its weights are there once."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from a3_engine.engine import A3Engine
from a3_engine.processes import Lock

_engines: WeakValueDictionary[tuple[tuple[str, Any], ...], A3Engine] = WeakValueDictionary()
_lock = Lock()


def shared_engine(**settings: Any) -> A3Engine:
    """The engine of :meth:`A3Engine.from_pretrained` with these settings, as long as one lives."""
    key = tuple(sorted(settings.items()))
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = A3Engine.from_pretrained(**settings)
        return engine


def is_shared(engine: A3Engine | None, **settings: Any) -> bool:
    """Whether this is the engine that such settings have now."""
    return engine is not None and engine is _engines.get(tuple(sorted(settings.items())))
