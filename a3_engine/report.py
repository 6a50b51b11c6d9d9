"""What happened in one request, or in ingestion."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Precomputed:
    """What ingestion did, in chunks: computed now, or stored before; the empty ones are neither."""

    computed: int
    present: int


@dataclass(frozen=True)
class ChunkUse:
    """One chunk of a prompt: its tokens, whether the store had it, its bytes read or written."""

    text: str
    n_tokens: int
    hit: bool
    nbytes: int


@dataclass
class FusionReport:
    """Counts in tokens, times in seconds, sizes in bytes.

    ``cached_tokens`` were read from the store, ``created_tokens`` belong to chunks that missed and
    were computed and stored now; ``recomputed_tokens`` of both were computed again in the fusion
    pass. ``fresh_tokens`` have no cached counterpart. ``select_s`` and ``recompute_s`` are parts of
    ``ttft_s``, the time from the call to the first token, as are ``load_s`` and ``encode_s``.
    ``fallback_reason`` says why ordinary prefill served the request, and is None for a fused one.
    """

    model: str = ""
    selector: str = ""
    ratio: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    created_tokens: int = 0
    fresh_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    chunks: list[ChunkUse] = field(default_factory=list)
    fallback_reason: str | None = None
    load_s: float = 0.0
    encode_s: float = 0.0
    select_s: float = 0.0
    recompute_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str = ""

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
        """Plain values for logs and framework metadata; chunk texts are left out."""
        values = asdict(self)
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
        lines = [f"A³ report · {self.model} · " + (self._how())]
        lines.append(
            f"  prompt     {self.prompt_tokens:>6} tokens: {self.cached_tokens} from the cache, "
            f"{self.created_tokens} computed and stored, {self.fresh_tokens} fresh"
        )
        if self.fused:
            lines.append(
                f"  recomputed {self.recomputed_tokens:>6} of "
                f"{self.cached_tokens + self.created_tokens} cached tokens"
            )
            lines.append(
                f"  chunks     {len(self.chunks):>6}: {self.hits} hits "
                f"({_size(self.bytes_read)} read), {self.misses} misses "
                f"({_size(self.bytes_written)} written)"
            )
        parts = {
            "load": self.load_s,
            "encode misses": self.encode_s,
            "select": self.select_s,
            "recompute": self.recompute_s,
        }
        detail = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value > 0)
        lines.append(f"  first token {self.ttft_s:>7.3f} s" + (f" ({detail})" if detail else ""))
        rate = (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0
        lines.append(
            f"  answer     {self.generated_tokens:>6} tokens in {self.decode_s:.3f} s"
            + (f" ({rate:.1f} a second)" if rate > 0 else "")
        )
        return "\n".join(lines)

    def _how(self) -> str:
        if self.fused:
            return f"fused by {self.selector} at ratio {self.ratio:g}"
        return f"ordinary prefill ({self.fallback_reason})"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
