"""What happened in one request, or in ingestion."""

from __future__ import annotations

import html
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from a3_engine.model.masks import LocalGlobal
from a3_engine.segments import Prompt


class TokenLogprob(NamedTuple):
    """One token of an answer.

    Parameters
    ----------
    token : str
        Its text, blanks included.
    logprob : float
        Natural logarithm of its probability, by the model's own distribution.
    top : tuple of (str, float)
        The likeliest tokens in its place with theirs, as many as were asked for.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ChunkUse:
    """One chunk of a prompt: its tokens, whether it was cached, its bytes read or written.

    A hit with ``nbytes == 0`` was still in memory from the previous turn.
    """

    text: str
    n_tokens: int
    hit: bool
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """The prompt of a request, and what of its chunks was recomputed.

    ``recomputed`` are sorted positions. ``kept_by_layer`` maps a layer to those that are still
    computed from there on, where the method prunes. ``local_global`` is the layer from which on
    they see less than everything before them, and what they see.
    """

    prompt: Prompt
    recomputed: tuple[int, ...]
    kept_by_layer: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    local_global: tuple[int, LocalGlobal] | None = field(default=None, hash=False, compare=False)

    def recomputed_by_layer(self, n_layers: int) -> list[tuple[int, ...]]:
        """The recomputed positions of each layer."""
        by_layer = [self.recomputed]
        for layer in range(1, n_layers):
            by_layer.append(self.kept_by_layer.get(layer, by_layer[-1]))
        return by_layer


@dataclass
class FusionReport:
    """Counts in tokens, times in seconds, sizes in bytes.

    ``cached_tokens`` were read from the store or left by the conversation's turn before, which are
    the ``reused_turn_tokens`` among them; ``history_tokens`` of them are earlier turns of the
    conversation from the store, and ``conversation`` is the tag by which these are evicted.
    ``created_tokens`` belong to chunks that missed and were computed and stored now;
    ``recomputed_tokens`` of both were computed again in the fusion pass, by some methods not in all
    of its layers.
    ``fresh_tokens`` have no cached counterpart. ``select_s`` and ``recompute_s`` are parts of
    ``ttft_s``, the time from the call to the first token, as are ``plan_s``, from the call to the
    prompt's token ids, ``load_s`` and ``encode_s``.
    ``stand_in`` names the passages that the chunks were computed after, as `a3 cache ls` does; it
    is empty where there were none.
    ``kv_bytes`` is what the prompt's keys and values take while a fused request decodes.
    ``fallback_reason`` says why ordinary prefill served the request, and is None for a fused one.
    ``logprobs`` has an entry for each token of the answer where the request asked for them.
    ``request_id`` leads from a framework's response, which holds `to_dict`, back to the report;
    ``trace`` is what `A3Engine.explain` draws.
    """

    model: str = ""
    selector: str = ""
    ratio: float = 0.0
    compression: str = ""
    stand_in: str = ""
    conversation: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reused_turn_tokens: int = 0
    history_tokens: int = 0
    created_tokens: int = 0
    fresh_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    chunks: list[ChunkUse] = field(default_factory=list)
    kv_bytes: int = 0
    fallback_reason: str | None = None
    plan_s: float = 0.0
    load_s: float = 0.0
    encode_s: float = 0.0
    select_s: float = 0.0
    recompute_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def fused(self) -> bool:
        """Whether cached chunks were used."""
        return self.fallback_reason is None

    @property
    def hits(self) -> int:
        return sum(chunk.hit for chunk in self.chunks)

    @property
    def misses(self) -> int:
        return len(self.chunks) - self.hits

    @property
    def bytes_read(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks if chunk.hit)

    @property
    def bytes_written(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks if not chunk.hit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for logs and framework metadata, without chunk texts and `logprobs`."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["trace"], values["logprobs"]
        values["chunks"] = len(self.chunks)
        values |= {
            "fused": self.fused,
            "hits": self.hits,
            "misses": self.misses,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }
        return values

    def __str__(self) -> str:
        lines = [f"A³ report · {self.model} · {self._how()}"]
        return "\n".join(lines + [f"  {name:<11} {text}" for name, text in self._rows()])

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        title = html.escape(f"{self.model} · {self._how()}")
        return f"<table><caption style='text-align:left'>{title}</caption>{rows}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        turns = [
            f"{self.reused_turn_tokens} of them kept from the turn before"
            * bool(self.reused_turn_tokens),
            f"{self.history_tokens} of earlier turns" * bool(self.history_tokens),
        ]
        kept = ", ".join(each for each in turns if each)
        rows = [
            (
                "prompt",
                f"{self.prompt_tokens} tokens: {self.cached_tokens} from the cache"
                f"{f' ({kept})' if kept else ''}, "
                f"{self.created_tokens} computed and stored, {self.fresh_tokens} fresh",
            )
        ]
        if self.fused:
            rows += [
                (
                    "recomputed",
                    f"{self.recomputed_tokens} of "
                    f"{self.cached_tokens - self.reused_turn_tokens + self.created_tokens} tokens "
                    "from the store",
                ),
                (
                    "chunks",
                    f"{len(self.chunks)}: {self.hits} hits ({_size(self.bytes_read)} read), "
                    f"{self.misses} misses ({_size(self.bytes_written)} written)"
                    + (f", computed after stand-in {self.stand_in}" if self.stand_in else ""),
                ),
                ("resident", f"{_size(self.kv_bytes)} of keys and values"),
            ]
        parts = {
            "plan": self.plan_s,
            "load": self.load_s,
            "encode misses": self.encode_s,
            "select": self.select_s,
            "recompute": self.recompute_s,
        }
        detail = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value > 0)
        rows.append(("first token", f"{self.ttft_s:.3f} s" + (f" ({detail})" if detail else "")))
        rate = (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0
        rows.append(
            (
                "answer",
                f"{self.generated_tokens} tokens in {self.decode_s:.3f} s"
                + (f" ({rate:.1f} a second)" if rate > 0 else ""),
            )
        )
        return rows

    def _how(self) -> str:
        if self.fused:
            kept = f", {self.compression} for decoding" if self.compression else ""
            return f"fused by {self.selector} at ratio {self.ratio:g}{kept}"
        return f"ordinary prefill ({self.fallback_reason})"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
