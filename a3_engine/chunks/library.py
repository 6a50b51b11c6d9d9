"""The chunks of one engine: found in the store or computed, exactly once, and kept."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from a3_engine.chunks.catalogue import Catalogue
from a3_engine.chunks.codec import ChunkKV, Header
from a3_engine.chunks.encoding import encode_chunk
from a3_engine.chunks.fingerprint import chunk_key
from a3_engine.chunks.store import ChunkStore
from a3_engine.errors import StoreError
from a3_engine.model.rotary import Rotation
from a3_engine.prompt import Segment

logger = logging.getLogger(__name__)

STRIPES = 64


class Fetched(NamedTuple):
    """A chunk's KV, whether the store had it, and the seconds that computing it took."""

    kv: ChunkKV
    hit: bool
    seconds: float


class ChunkLibrary:
    """Chunks computed by one model behind one encode prefix.

    Parameters
    ----------
    decoder, rotation
        What computes a missing chunk.
    engine : str
        Fingerprint of model, tokenizer, dtype and rotary parameters.
    dtype : str
        The dtype that payloads must have.
    prefix_ids : tuple of int
        What chunks are computed behind; may be empty.
    computing : threading.Lock
        Held while the model computes.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        rotation: Rotation,
        store: ChunkStore,
        catalogue: Catalogue,
        *,
        engine: str,
        dtype: str,
        prefix_ids: tuple[int, ...],
        computing: threading.Lock,
    ) -> None:
        self.store = store
        self.catalogue = catalogue
        self.prefix_ids = prefix_ids
        self._decoder, self._rotation = decoder, rotation
        self._engine, self._dtype = engine, dtype
        self._computing = computing
        # Two requests that miss the same chunk meet at one of these, and compute it once.
        self._flights = [threading.Lock() for _ in range(STRIPES)]

    def missing(self, segments: Sequence[Segment]) -> list[Segment]:
        """Those that are not stored, each once; the stored ones take over the segments' tags."""
        by_key = {self.header(segment).key: segment for segment in segments}
        stored = self.store.contains_many(by_key)
        self.store.retag({key: tag for key in stored if (tag := by_key[key].tag) is not None})
        return [segment for key, segment in by_key.items() if key not in stored]

    def fetch(self, segment: Segment, *, must_store: bool = False) -> Fetched:
        """Load a segment's KV, or compute and store it, and know its text from then on.

        Where it cannot be stored it serves this request alone, with a warning, unless
        ``must_store`` makes that an error.

        Never call this while holding the lock for computing: another thread may hold the flight
        and wait for that lock.
        """
        header = self.header(segment)
        if (kv := self.store.get(header)) is not None:
            return Fetched(kv, True, 0.0)
        prefix = None
        if segment.kind == "chunk" and self.prefix_ids:
            prefix = self.fetch(Segment("prefix", self.prefix_ids)).kv
        with self._flights[int(header.key[:8], 16) % STRIPES]:
            if (kv := self.store.get(header)) is not None:
                return Fetched(kv, True, 0.0)
            with self._computing:
                started = time.perf_counter()
                kv = encode_chunk(self._decoder, self._rotation, segment.ids, prefix)
            try:
                self.store.put(header, kv, segment.tag)
                self.catalogue.add([(segment.text, segment.tag)])
            except StoreError as error:
                if must_store:
                    raise
                logger.warning("%s The chunk serves this request only.", error)
            return Fetched(kv, False, time.perf_counter() - started)

    def evict(self, tag: str) -> int:
        """Remove the chunks with this tag; returns how many were stored."""
        self.catalogue.forget(tag)
        return self.store.evict(tag)

    def header(self, segment: Segment) -> Header:
        """What the payload of a segment must say of itself."""
        behind = () if segment.kind == "prefix" else self.prefix_ids
        key = chunk_key(self._engine, behind, segment.ids)
        return Header(key, self._engine, len(segment.ids), self._dtype)
