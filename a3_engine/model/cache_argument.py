"""What a model calls its cache: ``cache`` since transformers 5.24, ``past_key_values`` before.

The code of a model repository may have the older name with any transformers, and layers of
GPT-NeoX have one of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import LlamaModel

NAMES = ("cache", "past_key_values", "layer_past")


@lru_cache
def _accepted(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


OURS = _accepted(LlamaModel.forward) or NAMES[0]


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward is given a cache."""
    return _accepted(type(module).forward) is not None


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a module's forward takes this cache."""
    return {_accepted(type(module).forward) or OURS: cache}


def other_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """A call's keyword arguments with another cache, or None, in place of theirs."""
    return {name: cache if name in NAMES else value for name, value in arguments.items()}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's keyword arguments, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
