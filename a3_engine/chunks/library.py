"""The chunks of one engine: found in the store or computed, exactly once, and kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import torch

from a3_engine.chunks.codecs import CODECS, DEFAULT_CODEC
from a3_engine.chunks.codecs.base import Codec
from a3_engine.chunks.fingerprint import chunk_key, digest
from a3_engine.chunks.keyed_locks import KeyedLocks
from a3_engine.chunks.known import About, Known
from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.resident import Resident
from a3_engine.chunks.text_index import TextIndex
from a3_engine.chunks.tiers import DiskStore, TieredStore
from a3_engine.errors import StoreError
from a3_engine.kv import ChunkKV, KVShape
from a3_engine.segments import Segment

logger = logging.getLogger(__name__)

READERS = 8  # chunks of a request that are read and checked at once
HEAD_TOKENS = 64

Item = TypeVar("Item")


class Fetched(NamedTuple):
    """A chunk's KV, whether the store had it, its stored bytes, and the seconds of computing it."""

    kv: ChunkKV
    hit: bool
    nbytes: int
    seconds: float


class Encoder(Protocol):
    """What computes a missing chunk; see :class:`~a3_engine.fusion.encoding.ChunkEncoder`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> KVShape: ...

    def batches(self, items: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[Item]]: ...

    def encode(
        self, chunks: Sequence[Sequence[int]], prefix: ChunkKV | None
    ) -> tuple[list[ChunkKV], float]: ...


class ChunkLibrary:
    """Chunks computed by one model after one encode prefix and one stand-in.

    Parameters
    ----------
    encoder : Encoder
    engine : str
        Fingerprint of model, tokenizer, dtype, codec and rotary parameters.
    codec : Codec
        How chunks are stored. What they are computed after is always raw.
    beside : tuple of str
        Keys of what the store must not drop before the chunks: the codec's basis.
    prefix_ids, stand_in_ids : tuple of int
        What chunks are computed after; may be empty.
    room : int
        Tokens that the model's positions are good for.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: DiskStore | TieredStore,
        text_index: TextIndex,
        *,
        engine: str,
        codec: Codec,
        beside: tuple[str, ...] = (),
        prefix_ids: tuple[int, ...],
        stand_in_ids: tuple[int, ...],
        room: int,
    ) -> None:
        self.store = store
        self.text_index = text_index
        self.prefix_ids, self._all_ids = prefix_ids, prefix_ids + stand_in_ids
        self.stand_in = digest(stand_in_ids)[:12] if stand_in_ids else ""
        self._room = room
        self.encoder = encoder
        self._shape, self._dtype = encoder.shape, encoder.dtype
        self._engine, self.codec, self._beside = engine, codec, beside
        # Two requests that miss the same chunk meet here, and compute it once.
        self._flights = KeyedLocks()
        self._device = encoder.device
        self.resident = Resident.on(self._device)
        # On a CPU the hashes of several chunks at once take longer than the one it is used for.
        self._readers = (
            None if self._device.type == "cpu" else ThreadPoolExecutor(READERS, "a3-read")
        )

    def of(self, engine: str, codec: Codec, beside: tuple[str, ...]) -> ChunkLibrary:
        """The same for another fingerprint."""
        return ChunkLibrary(
            self.encoder,
            self.store,
            self.text_index.of(engine),
            engine=engine,
            codec=codec,
            beside=beside,
            prefix_ids=self.prefix_ids,
            stand_in_ids=self._all_ids[len(self.prefix_ids) :],
            room=self._room,
        )

    def missing(self, segments: Sequence[Segment]) -> list[Segment]:
        """Those that are not stored, each once."""
        by_key = {self.header(segment).key: segment for segment in segments}
        stored = self.store.contains_many(by_key)
        return [segment for key, segment in by_key.items() if key not in stored]

    def know(self, segments: Iterable[Segment]) -> None:
        """Find these segments' texts in prompts, and remember their tags; see `TextIndex`."""
        self.text_index.add(
            (segment.text, self.header(segment).key, segment.tag) for segment in segments
        )

    def tag(self, segments: Iterable[Segment]) -> None:
        """Give chunks that may be stored already these segments' tags too, in every tier."""
        by_tag: dict[str, set[str]] = {}
        for segment in segments:
            if segment.tag is not None:
                by_tag.setdefault(segment.tag, set()).add(self.header(segment).key)
        for tag, keys in by_tag.items():
            self.store.retag(dict.fromkeys(keys, tag))

    def fetch_all(
        self, segments: Sequence[Segment], beside: Sequence[Segment]
    ) -> Iterator[Fetched]:
        """:meth:`fetch` of each; for a GPU, several are read and checked at once."""
        if self._readers is None:
            return (self.fetch(segment, beside) for segment in segments)
        # The threads wait on behalf of this request; see `patience`.
        contexts = [copy_context() for _ in segments]
        return self._readers.map(
            lambda context, segment: context.run(self.fetch, segment, beside), contexts, segments
        )

    def keep_resident(self, brought: Iterable[tuple[Segment, ChunkKV]]) -> None:
        """Leave what a request has brought to the device, whole, there for the next one."""
        for segment, kv in brought:
            self.resident.put(self.header(segment).key, kv)

    def fetch(self, segment: Segment, beside: Iterable[Segment] = ()) -> Fetched:
        """Load a segment's KV, or compute and store it, and know its text from then on.

        What is used ``beside`` it makes no room for it.

        Where it cannot be stored it serves this request alone, with a warning.

        Never call this in the thread that computes: another one may hold the flight and wait for
        it.
        """
        header = self.header(segment)
        if (resident := self.resident.get(header.key)) is not None:
            return Fetched(resident, True, self._nbytes(header), 0.0)
        if (stored := self._home(segment).get(header)) is not None:
            return Fetched(self._beside_device(stored), True, stored.nbytes, 0.0)
        context = self._context_kv(segment)
        with self._flights.of(header.key):
            if (stored := self._home(segment).get(header)) is not None:
                return Fetched(self._beside_device(stored), True, stored.nbytes, 0.0)
            self.touch(beside)
            [payload], started = self._compute([segment], context)
            try:
                self._home(segment).put(payload, segment.tag)
            except StoreError as error:
                logger.warning("%s The chunk serves this request only.", error)
            # Decoded, so that this request answers as all later ones will.
            seconds = time.perf_counter() - started
            return Fetched(self._decoded(payload), False, payload.nbytes, seconds)

    def _home(self, segment: Segment) -> DiskStore | TieredStore:
        """Turns of conversations stay on this machine."""
        return self.store.local if segment.owner else self.store

    def _beside_device(self, stored: Payload) -> ChunkKV:
        """A stored chunk where the device gets at it fast: decoded there, or in pinned memory."""
        if self._device.type != "cuda":
            return self._decoded(stored)
        if stored.header.codec != DEFAULT_CODEC:
            return self._decoded(stored.on(self._device))
        kv = self._decoded(stored)
        return kv if kv.keys.is_pinned() else ChunkKV(kv.keys.pin_memory(), kv.values.pin_memory())

    def _decoded(self, payload: Payload) -> ChunkKV:
        kv = payload.kv(self._codec_of(payload.header))
        if payload.header.codec not in CODECS and self._device.type == "cpu":
            self.store.keep_decoded(payload, kv)
        return kv

    def _codec_of(self, header: Header) -> Codec:
        return self.codec if header.codec == self.codec.name else CODECS[header.codec]

    def touch(self, segments: Iterable[Segment]) -> None:
        """Let the least recently used chunks be others; a write, so not before a first token."""
        self.store.touch([*(self.header(segment).key for segment in segments), *self._beside])

    def store_all(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Compute and store segments; yields once for each that has become durable.

        The shortest come first, and short ones are computed together; while some are written, the
        next are computed.

        Raises
        ------
        StoreError
            A segment cannot be written; what was written before it stays.
        """
        together = [
            batch
            for _, group in groupby(sorted(segments, key=self.context_ids), self.context_ids)
            for batch in self._batches(list(group))
        ]
        with ThreadPoolExecutor(1, "a3-store") as writer:
            before: Future[int] | None = None
            for batch in together:
                before, done = self._launch(batch, writer), before
                if done is not None:
                    yield from [None] * done.result()
            if before is not None:
                yield from [None] * before.result()

    def _batches(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        lengths = [len(segment.ids) for segment in segments]
        return self.encoder.batches(segments, lengths)

    def _launch(self, batch: Sequence[Segment], writer: ThreadPoolExecutor) -> Future[int]:
        """Compute segments unless they were stored meanwhile; their flight ends on disk."""
        context = self._context_kv(batch[0])
        with self._flights.of(*(self.header(segment).key for segment in batch)) as held:
            missing = self.missing(batch)
            payloads = self._compute(missing, context)[0] if missing else []
            flight = held.pop_all()

        def land() -> int:
            at_once = map if self._readers is None else self._readers.map
            tags = [segment.tag for segment in missing]
            with flight:
                list(at_once(self.store.put, payloads, tags))
            return len(batch)

        return writer.submit(land)

    def context_ids(self, segment: Segment) -> tuple[int, ...]:
        """Ids that a segment is computed after; no stand-in where both would not fit."""
        if segment.kind == "prefix":
            return ()
        if segment.context is not None:
            return segment.context
        fits = len(self._all_ids) + len(segment.ids) <= self._room
        return self._all_ids if fits and segment.kind == "chunk" else self.prefix_ids

    def head(self, chunk: Segment) -> Segment | None:
        """A chunk's first tokens, computed after the prefix alone; None where it is itself so.

        A chunk that opens a prompt has no other document before it, and its first tokens feel
        that most: with its head these are exact.
        """
        if self.context_ids(chunk) == self.prefix_ids:
            return None
        return Segment("head", chunk.ids[:HEAD_TOKENS], tag=chunk.tag, owner=chunk.owner)

    def _context_kv(self, segment: Segment) -> ChunkKV | None:
        """KV of what a segment is computed after; stored as all else, so computed once."""
        if not (ids := self.context_ids(segment)):
            self.touch([])  # what the chunks need beside them is used all the same
            return None
        before = Segment("prefix", ids)
        kv = self.fetch(before).kv
        self.touch([before])
        return kv

    def _compute(
        self, segments: Sequence[Segment], context: ChunkKV | None
    ) -> tuple[list[Payload], float]:
        """The segments' payloads, and when their computation began."""
        computed, started = self.encoder.encode([segment.ids for segment in segments], context)
        return [
            Payload.of(kv, header := self.header(segment), _about(segment), self._codec_of(header))
            for kv, segment in zip(computed, segments, strict=True)
        ], started

    def evict(self, tag: str) -> int:
        """Remove the chunks that have this tag alone, and their heads; returns how many entries."""
        self.text_index.write()  # what has the tag since a moment ago
        keys = self.store.evict(tag)
        self.resident.discard(keys)
        return len(keys)

    def nbytes(self, segment: Segment) -> int:
        """Bytes that a segment takes in the store, or about so many."""
        return self._nbytes(self.header(segment))

    def _nbytes(self, header: Header) -> int:
        return self._codec_of(header).nbytes(*header.shapes, header.torch_dtype)

    def header(self, segment: Segment) -> Header:
        """What the payload of a segment must say of itself."""
        context = self.context_ids(segment)
        engine = digest(self._engine, segment.owner) if segment.owner else self._engine
        key = chunk_key(engine, context, segment.ids)
        codec = DEFAULT_CODEC if segment.kind == "prefix" else self.codec.name
        shape, values = self._shape.of_chunk(len(segment.ids))
        return Header(
            key,
            self._engine,
            shape,
            self._dtype,
            codec,
            stand_in=self.stand_in if context != self.prefix_ids and context else "",
            value_dim=0 if values == shape else values[3],
        )


def _about(segment: Segment) -> str:
    """A conversation's words are looked for where it says them, and nowhere else."""
    known = None if segment.owner else Known.of(segment.text)
    return About(known, segment.tag).to_json()
