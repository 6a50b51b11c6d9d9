"""The prefix cache: what one request leaves serves the next that begins with all its tokens.

The next prompt of a chat is usually the last one, its answer, and something new. Keys and values
depend on nothing that comes after them, so those of the old tokens stay; only the new ones are
computed, or fused where they are chunks. A prompt that begins in any other way shares nothing and
is fused as a whole.

A cached prefix is as exact as it was made: where chunks were fused approximately, the turns that
extend it go on with that approximation. It therefore serves the same method at the same ratio only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.selectors.base import Selector
from a3_engine.processes import Lock

MAX_PREFIXES = 4  # a few conversations, or a few branches of one
MAX_BYTES = 2**30


@dataclass(frozen=True)
class CachedPrefix:
    """One answered request. What it holds is never written again.

    Parameters
    ----------
    ids : tuple of int
        The prompt and the whole answer.
    n_prompt : int
        How many of them are the prompt.
    selector : Selector
        What the cache was made by.
    states : tuple of (keys, values)
        A pair a layer, each ``(1, kv_heads, tokens, head_dim)``, rotated into place. The answer's
        last token was never fed, and has none.
    """

    ids: tuple[int, ...]
    n_prompt: int
    selector: Selector
    states: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def n_cached(self) -> int:
        return self.states[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes kept alive, with the slots that the answer left free."""
        states = (state for pair in self.states for state in pair if state is not None)
        storages = (state.untyped_storage() for state in states)
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def shared(self, ids: Sequence[int]) -> int:
        """Tokens that a prompt may take over; 0 unless it goes on after this prompt's answer.

        An answer may come back cut, by a stop string or a strip: what stands before is still the
        same. At least one token is left to compute, whose logits choose the answer.
        """
        if tuple(ids[: self.n_prompt]) != self.ids[: self.n_prompt]:
            return 0
        same = self.n_prompt
        for ours, theirs in zip(self.ids[same:], ids[same:], strict=False):
            if ours != theirs:
                break
            same += 1
        return min(same, self.n_cached, len(ids) - 1) if same > self.n_prompt else 0

    @torch.inference_mode()
    def copy_to(self, cache: FusedCache, tokens: int) -> None:
        """Lay the first tokens into a pending cache."""
        for layer, (keys, values) in zip(cache.layers, self.states, strict=True):
            if not layer.shape.heads:  # nothing is kept there
                continue
            own_keys, own_values = layer.shape.ours(*layer.stored())
            own_keys[:, :, :tokens] = keys[:, :, :tokens]
            own_values[:, :, :tokens] = values[:, :, :tokens]


class PrefixCache:
    """The last turns of one model, bounded by number and by bytes; safe to use from threads."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES, max_bytes: int = MAX_BYTES) -> None:
        self._max_prefixes, self._max_bytes = max_prefixes, max_bytes
        self._prefixes: list[CachedPrefix] = []  # the one used last is the last
        self._lock = Lock()
        self._closed = False

    def put(self, ids: Sequence[int], n_prompt: int, selector: Selector, cache: Cache) -> None:
        """Keep a finished request's cache; nobody may write it from now on."""
        states = tuple((layer.keys, layer.values) for layer in cache.layers)
        prefix = CachedPrefix(tuple(ids), n_prompt, selector, states)
        with self._lock:
            if self._closed or prefix.nbytes > self._max_bytes:
                return
            self._prefixes = [
                kept
                for kept in self._prefixes
                if (kept.ids, kept.selector) != (prefix.ids, selector)
            ]
            self._prefixes.append(prefix)
            while (
                len(self._prefixes) > self._max_prefixes
                or sum(kept.nbytes for kept in self._prefixes) > self._max_bytes
            ):
                del self._prefixes[0]

    def find(self, ids: Sequence[int], selector: Selector) -> tuple[CachedPrefix | None, int]:
        """The turn by this method that a prompt shares most tokens with, and how many."""
        with self._lock:
            shared = [
                (prefix.shared(ids), place)
                for place, prefix in enumerate(self._prefixes)
                if prefix.selector == selector
            ]
            tokens, place = max(shared, default=(0, 0))
            if not tokens:
                return None, 0
            self._prefixes.append(self._prefixes.pop(place))
            return self._prefixes[-1], tokens

    def clear(self) -> None:
        """Forget all turns."""
        with self._lock:
            self._prefixes.clear()

    def close(self) -> None:
        """Forget all turns, and keep none from now on."""
        with self._lock:
            self._closed = True
            self._prefixes.clear()
