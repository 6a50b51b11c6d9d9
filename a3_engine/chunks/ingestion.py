"""Computing the chunks of a corpus ahead of their questions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm.auto import tqdm

from a3_engine.errors import ContextOverflowError
from a3_engine.prompt import Chunk
from a3_engine.runtime import Runtime
from a3_engine.segments import Segment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precomputed:
    """What ingestion did, in chunks: computed now, or stored before; the empty ones are neither."""

    computed: int
    present: int


def ingest(
    runtime: Runtime, chunks: Iterable[str | Chunk], context_window: int, progress: bool
) -> Precomputed:
    """Compute and store the KV of chunks that are not stored yet; see `A3Engine.precompute`."""
    if runtime.library is None:
        logger.warning("Nothing is precomputed: %s.", runtime.support.reason)
        return Precomputed(0, 0)
    segments = []
    for chunk in chunks:
        text, tag = (chunk.text, chunk.tag) if isinstance(chunk, Chunk) else (chunk, None)
        if ids := runtime.planner.chunk_ids(text):
            segments.append(Segment("chunk", ids, text.strip(), tag))
    for segment in segments:
        n_tokens = len(runtime.planner.prefix_ids) + len(segment.ids)
        if n_tokens >= context_window:
            raise ContextOverflowError(
                f"A chunk has {n_tokens} tokens with what it is computed behind; the model's "
                f"context window is {context_window}. Split it into smaller chunks. It "
                f"begins with {segment.text[:40]!r}."
            )
    library = runtime.library
    heads = [head for segment in segments if (head := library.head(segment)) is not None]
    missing = library.missing([*segments, *heads])
    quiet = not progress or not missing
    with tqdm(total=len(missing), desc="Computing KV", unit="chunk", disable=quiet) as bar:
        for _ in library.store_all(missing):
            bar.update()
    library.catalogue.add((segment.text, segment.tag) for segment in segments)
    computed = sum(segment.kind == "chunk" for segment in missing)
    return Precomputed(computed, len(segments) - computed)
