"""Computing the chunks of a corpus before anybody asks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm.auto import tqdm

from a3_engine.errors import ContextOverflowError
from a3_engine.messages import Chunk
from a3_engine.runtime import Runtime
from a3_engine.segments import Segment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precomputed:
    """What ingestion did, in chunks: computed now, or stored before; the empty ones are neither.

    ``dropped`` of these are not stored any more, since the store is smaller than all of them.
    """

    computed: int
    present: int
    dropped: int = 0


def ingest(
    runtime: Runtime, chunks: Iterable[str | Chunk], context_window: int, progress: bool
) -> Precomputed:
    """Compute and store the KV of chunks that are not stored yet; see `A3Engine.precompute`."""
    if runtime.library is None:
        logger.warning("Nothing is precomputed: %s.", runtime.gate.reason)
        return Precomputed(0, 0)
    segments = runtime.planner.segments(chunks)
    for segment in segments:
        n_tokens = len(runtime.planner.prefix_ids) + len(segment.ids)
        if n_tokens >= context_window:
            raise ContextOverflowError(
                f"A chunk has {n_tokens} tokens with what it is computed after; the model's "
                f"context window is {context_window}. Split it into smaller chunks. It "
                f"begins with {segment.text[:40]!r}."
            )
    library = runtime.library
    heads = [head for segment in segments if (head := library.head(segment)) is not None]
    missing = library.missing([*segments, *heads])
    _say_what_it_takes(runtime, missing)
    quiet = not progress or not missing
    dropping = False
    with tqdm(total=len(missing), desc="Computing KV", unit="chunk", disable=quiet) as bar:
        for _ in library.store_all(missing):
            bar.update()
            if not dropping and bar.n > 1 and library.missing([_first(missing)]):
                dropping = True
                logger.warning(
                    "The chunk store is full: chunks of this very ingestion are dropped for later "
                    "ones. %s",
                    _way_out(runtime),
                )
    library.tag([*segments, *heads])
    library.know(segments)
    library.text_index.write()
    computed = sum(segment.kind == "chunk" for segment in missing)
    dropped = 0 if runtime.store.local.readonly else len(library.missing(segments))
    return Precomputed(computed, len(segments) - computed, dropped)


def _first(segments: list[Segment]) -> Segment:
    """The one that ingestion stores first, and a full store drops first."""
    return min(segments, key=lambda segment: len(segment.ids))


def _say_what_it_takes(runtime: Runtime, missing: list[Segment]) -> None:
    """Before the first is computed; a warning where the store cannot hold them."""
    assert runtime.library is not None
    nbytes = sum(runtime.library.nbytes(segment) for segment in missing)
    limit = runtime.store.local.size_limit
    n_chunks = sum(segment.kind == "chunk" for segment in missing)
    logger.info("%d chunks will take %.2f GiB of the disk.", n_chunks, nbytes / 2**30)
    if nbytes > limit:
        logger.warning(
            "%d chunks will take %.2f GiB, and the chunk store keeps to %.2f GiB: the first will "
            "be dropped for the last. %s",
            n_chunks,
            nbytes / 2**30,
            limit / 2**30,
            _way_out(runtime),
        )


def _way_out(runtime: Runtime) -> str:
    stored = runtime.library.codec.name if runtime.library is not None else ""
    smaller = {"raw": "compact or int8", "int8": "compact or int4", "int4": "compact"}.get(stored)
    codec = f", or store them as {smaller} by codec=" if smaller else ""
    return f"Raise size_limit{codec}."
