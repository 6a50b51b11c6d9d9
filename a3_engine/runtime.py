"""What an engine makes on first use: the model, its planner, the gate's word, the chunks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine.chunks.calibration import make_codec
from a3_engine.chunks.codecs.base import Codec
from a3_engine.chunks.fingerprint import (
    Watch,
    digest,
    model_fingerprint,
    tokenizer_fingerprint,
)
from a3_engine.chunks.library import ChunkLibrary, Encoder
from a3_engine.chunks.stand_in import AUTO, passages_of
from a3_engine.chunks.store import StoreOptions
from a3_engine.chunks.text_index import TextIndex
from a3_engine.chunks.tiers import DiskStore, TieredStore, open_store
from a3_engine.decoding.batching import BatchedDecoder
from a3_engine.decoding.seeds import Seeds
from a3_engine.errors import UnsupportedModelError, shortened
from a3_engine.fusion.encoding import ChunkEncoder
from a3_engine.fusion.prefix_cache import MAX_BYTES, PrefixCache
from a3_engine.fusion.sparse import LocalQueries
from a3_engine.gate import GateResult, check_model
from a3_engine.model.executor import DeviceExecutor
from a3_engine.model.kv_shape import token_nbytes
from a3_engine.model.packing import pack
from a3_engine.model.probe import TEXT
from a3_engine.native import loops
from a3_engine.profile import Profile, profile_path, read_profile
from a3_engine.prompt import PromptPlanner
from a3_engine.report import FusionReport
from a3_engine.turns import Turns

logger = logging.getLogger(__name__)

MAX_REPORTS = 64
LOOPS_S = 1.0  # that a start waits for the native loops of an earlier one
PREFIX_CACHE_TOKENS = (
    16_384  # of kept conversations, where that is more than the least bound in bytes
)


@dataclass(frozen=True)
class Runtime:
    """A loaded model and what serves it.

    ``library`` and ``local_queries`` are None for a model that the gate refused. ``decoder`` lets
    requests that decode at the same time share their steps. ``watch`` notices changed weights.
    ``profile`` is what was tuned for this model, where the settings leave that open. ``turns`` is
    None where finished turns are not kept.
    ``reports`` are those of the last requests, to be explained.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    planner: PromptPlanner
    gate: GateResult
    store: DiskStore | TieredStore
    library: ChunkLibrary | None
    local_queries: LocalQueries | None
    fingerprint: str
    decoder: BatchedDecoder
    watch: Watch
    prefix_cache: PrefixCache
    profile: Profile | None = None
    turns: Turns | None = None
    seeds: Seeds = field(default_factory=Seeds)
    reports: deque[FusionReport] = field(default_factory=lambda: deque(maxlen=MAX_REPORTS))

    @property
    def context_window(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return context_window(self.model)

    @property
    def executor(self) -> DeviceExecutor:
        """Where the model computes."""
        return self.decoder.executor

    def make_room(self) -> None:
        """Give back the device's memory that serves requests to come, for the one that wants it."""
        self.prefix_cache.clear()
        if self.library is not None:
            self.library.resident.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release file handles, kept turns and memory kept for caches."""
        self.prefix_cache.close()
        if self.turns is not None:
            self.turns.close()
        self.executor.buffers.clear()
        if self.library is not None:
            self.library.text_index.try_to_write()
        self.store.close()


def context_window(model: PreTrainedModel) -> int:
    """Positions that a model was made for."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**31


def start(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    own: bool,
    cache_dir: Path,
    encode_prefix: str,
    stand_in: str | Sequence[str],
    size_limit: int | None,
    codec: str,
    store: StoreOptions,
    turns_kept_s: float,
) -> Runtime:
    """Examine a model and open its store.

    Parameters
    ----------
    own : bool
        Nobody else uses the model, so that its weights may be packed.

    Raises
    ------
    StoreError
        The folder cannot be used.
    """
    if model.device.type == "cpu":
        # Those of an earlier start are there at once; compiling goes on beside the first answers.
        loops.library(model.dtype, LOOPS_S)
    weights, tokens = _weights(model), tokenizer_fingerprint(tokenizer)
    profile = None
    if stand_in == AUTO:
        profile = read_profile(profile_path(cache_dir, weights.identity, tokens, encode_prefix))
    passages = passages_of(profile.stand_in if profile else stand_in)
    planner = PromptPlanner(tokenizer, encode_prefix, passages)
    decoder = BatchedDecoder(model)
    text = [*planner.prefix_ids[:1], *planner.tokenize_text(TEXT)]
    gate = decoder.executor.run(lambda: check_model(model, text))
    gate = _with_weights(weights, gate)
    if gate.reason is not None:
        logger.warning("%s is served by ordinary prefill: %s.", name, gate.reason)
    elif not gate.tested:
        logger.warning(
            "%s passed the self-check, but its type %r is not among those tested.",
            name,
            model.config.get_text_config().model_type,
        )
    chunks = open_store(cache_dir / "chunks", size_limit, store, pin=model.device.type == "cuda")
    limit = chunks.local.size_limit
    logger.info("Chunk store at %s, up to %.1f GiB.", cache_dir / "chunks", limit / 2**30)
    if own and gate.reason is None and gate.tested:
        pack(model)
    library = turns = None
    engine = _identity(weights, tokens, gate, codec)
    if gate.rotation is not None:
        encoder = ChunkEncoder(model.get_decoder(), gate.rotation, decoder.executor)
        uncoded = _identity(weights, tokens, gate, "")
        found, beside = _codec(codec, uncoded, chunks, encoder, planner)
        engine = _identity(weights, tokens, gate, found.identity)
        library = ChunkLibrary(
            encoder,
            chunks,
            TextIndex(chunks.local, engine),
            engine=engine,
            codec=found,
            beside=beside,
            prefix_ids=planner.prefix_ids,
            stand_in_ids=planner.stand_in_ids,
            room=min(context_window(model), gate.rotation.max_tokens or 2**31),
        )
        planner.find = library.text_index.find
        if turns_kept_s > 0 and not chunks.local.readonly:
            turns = Turns(library, chunks.local, turns_kept_s)
            turns.expire()
            planner.stored = turns.stored
    return Runtime(
        name=name,
        model=model,
        tokenizer=tokenizer,
        planner=planner,
        gate=gate,
        store=chunks,
        library=library,
        local_queries=LocalQueries(model, gate.rotation) if gate.rotation else None,
        fingerprint=digest(engine, planner.prefix_ids + planner.stand_in_ids),
        decoder=decoder,
        watch=Watch(model),  # which holds weights, so that it comes after packing
        prefix_cache=_prefix_cache(model, gate),
        profile=profile,
        turns=turns,
    )


def renewed(runtime: Runtime) -> Runtime:
    """A runtime for the same model after a change of its weights: what was stored stays behind."""
    watch, old = Watch(runtime.model), runtime.library
    if old is None:
        return replace(runtime, watch=watch)
    weights, tokens = _weights(runtime.model), tokenizer_fingerprint(runtime.tokenizer)
    gate = _with_weights(weights, runtime.gate)
    library, engine = None, _identity(weights, tokens, gate, old.codec.name)
    if gate.rotation is not None:
        uncoded = _identity(weights, tokens, gate, "")
        codec, beside = _codec(old.codec.name, uncoded, old.store, old.encoder, runtime.planner)
        engine = _identity(weights, tokens, gate, codec.identity)
        library = old.of(engine, codec, beside)
    runtime.planner.find = library.text_index.find if library is not None else None
    turns = runtime.turns.of(library) if runtime.turns is not None and library is not None else None
    runtime.planner.stored = turns.stored if turns is not None else None
    return replace(
        runtime,
        gate=gate,
        library=library,
        fingerprint=digest(engine, runtime.planner.prefix_ids + runtime.planner.stand_in_ids),
        prefix_cache=_prefix_cache(runtime.model, gate),
        watch=watch,
        turns=turns,
    )


def _codec(
    name: str,
    uncoded: str,
    store: DiskStore | TieredStore,
    encoder: Encoder,
    planner: PromptPlanner,
) -> tuple[Codec, tuple[str, ...]]:
    """See `make_codec`; ``uncoded`` is the fingerprint of what makes keys and values."""
    return make_codec(name, uncoded, store, encoder, planner.tokenize_text, planner.prefix_ids)


def _prefix_cache(model: PreTrainedModel, gate: GateResult) -> PrefixCache:
    """Room for kept conversations by the model's bytes a token; a refused model keeps none."""
    if gate.rotation is None:
        return PrefixCache()
    return PrefixCache(max_bytes=max(MAX_BYTES, PREFIX_CACHE_TOKENS * token_nbytes(model)))


class Weights(NamedTuple):
    """The fingerprint of a model's weights, or why there is none."""

    identity: str
    reason: str | None = None


def _weights(model: PreTrainedModel) -> Weights:
    try:
        return Weights(model_fingerprint(model))
    except UnsupportedModelError as error:
        return Weights("unknown", str(error))
    except Exception as error:
        return Weights("unknown", f"its weights cannot be read: {shortened(error)}")


def _with_weights(weights: Weights, gate: GateResult) -> GateResult:
    """A model whose weights cannot be told from others is not fused."""
    if weights.reason is None:
        return gate
    return replace(gate, rotation=None, reason=gate.reason or weights.reason)


def _identity(weights: Weights, tokenizer: str, gate: GateResult, codec: str) -> str:
    """Fingerprint of what makes keys and values."""
    rotation = gate.rotation
    turning = ([row.tolist() for row in rotation.inv_freq], rotation.adjacent) if rotation else None
    return digest(weights.identity, tokenizer, codec, turning)
