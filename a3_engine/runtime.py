"""What an engine makes on first use: the model, its planner, the gate's word, the chunks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine.chunks.fingerprint import (
    Watch,
    digest,
    model_fingerprint,
    tokenizer_fingerprint,
)
from a3_engine.chunks.library import ChunkLibrary
from a3_engine.chunks.stand_in import passages_of
from a3_engine.chunks.store import StoreOptions
from a3_engine.chunks.text_index import Catalogue
from a3_engine.chunks.tiers import DiskStore, TieredStore, open_store
from a3_engine.decoding.batching import SharedDecoding
from a3_engine.decoding.seeds import Seeds
from a3_engine.errors import shortened
from a3_engine.fusion.buffers import BUFFERS
from a3_engine.fusion.encoding import ChunkEncoder
from a3_engine.fusion.prefix_cache import MAX_BYTES, Turns
from a3_engine.fusion.sparse import LocalQueries
from a3_engine.gate import Support, examine
from a3_engine.model.executor import Computing
from a3_engine.model.kv_shape import token_nbytes
from a3_engine.model.packing import pack
from a3_engine.model.probe import TEXT
from a3_engine.native import loops
from a3_engine.prompt import PromptPlanner
from a3_engine.report import FusionReport

logger = logging.getLogger(__name__)

MAX_REPORTS = 64
TURN_TOKENS = 16_384  # of kept conversations, where that is more than the least bound in bytes


@dataclass(frozen=True)
class Runtime:
    """A loaded model and what serves it.

    ``library`` and ``local_queries`` are None for a model that the gate refused. ``shared`` lets
    requests that decode at the same time share their steps. ``watch`` notices changed weights.
    ``reports`` are those of the last requests, to be explained.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    planner: PromptPlanner
    support: Support
    store: DiskStore | TieredStore
    library: ChunkLibrary | None
    local_queries: LocalQueries | None
    fingerprint: str
    shared: SharedDecoding
    watch: Watch
    turns: Turns
    seeds: Seeds = field(default_factory=Seeds)
    reports: deque[FusionReport] = field(default_factory=lambda: deque(maxlen=MAX_REPORTS))

    @property
    def context_window(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return context_window(self.model)

    @property
    def computing(self) -> Computing:
        """Where the model computes."""
        return self.shared.computing

    def make_room(self) -> None:
        """Give back the device's memory that serves requests to come, for the one that wants it."""
        self.turns.clear()
        if self.library is not None:
            self.library.resident.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release file handles, kept turns and memory kept for caches."""
        self.turns.close()
        BUFFERS.clear()
        if self.library is not None:
            self.library.catalogue.try_to_write()
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
        loops.library(model.dtype)  # compiled now where it has to be, not during a request
    planner = PromptPlanner(tokenizer, encode_prefix, passages_of(stand_in))
    shared = SharedDecoding(model)
    text = [*planner.prefix_ids[:1], *planner.tokenize_text(TEXT)]
    support = shared.computing.run(lambda: examine(model, text))
    engine, support = _identity(model, tokenizer, codec, support)
    if support.reason is not None:
        logger.warning("%s is served by ordinary prefill: %s.", name, support.reason)
    elif not support.tested:
        logger.warning(
            "%s passed the self-check, but its type %r is not among those tested.",
            name,
            model.config.get_text_config().model_type,
        )
    chunks = open_store(cache_dir / "chunks", size_limit, store, pin=model.device.type == "cuda")
    limit = chunks.local.size_limit
    logger.info("Chunk store at %s, up to %.1f GiB.", cache_dir / "chunks", limit / 2**30)
    if own and support.reason is None and support.tested:
        pack(model)
    library = None
    if support.rotation is not None:
        library = ChunkLibrary(
            ChunkEncoder(model.get_decoder(), support.rotation, shared.computing),
            chunks,
            Catalogue(chunks.local, engine),
            engine=engine,
            codec=codec,
            prefix_ids=planner.prefix_ids,
            stand_in_ids=planner.stand_in_ids,
            room=min(context_window(model), support.rotation.max_tokens or 2**31),
        )
        planner.find = library.catalogue.find
    return Runtime(
        name=name,
        model=model,
        tokenizer=tokenizer,
        planner=planner,
        support=support,
        store=chunks,
        library=library,
        local_queries=LocalQueries(model, support.rotation) if support.rotation else None,
        fingerprint=digest(engine, planner.prefix_ids + planner.stand_in_ids),
        shared=shared,
        watch=Watch(model),  # which holds weights, so that it comes behind packing
        turns=_turns(model, support),
    )


def renewed(runtime: Runtime) -> Runtime:
    """A runtime for the same model after a change of its weights: what was stored stays behind."""
    watch, old = Watch(runtime.model), runtime.library
    if old is None:
        return replace(runtime, watch=watch)
    engine, support = _identity(runtime.model, runtime.tokenizer, old.codec, runtime.support)
    library = old.of(engine) if support.rotation is not None else None
    runtime.planner.find = library.catalogue.find if library is not None else None
    return replace(
        runtime,
        support=support,
        library=library,
        fingerprint=digest(engine, runtime.planner.prefix_ids + runtime.planner.stand_in_ids),
        turns=_turns(runtime.model, support),
        watch=watch,
    )


def _turns(model: PreTrainedModel, support: Support) -> Turns:
    """Room for kept conversations by the model's bytes a token; a refused model keeps none."""
    if support.rotation is None:
        return Turns()
    return Turns(max_bytes=max(MAX_BYTES, TURN_TOKENS * token_nbytes(model)))


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: str, support: Support
) -> tuple[str, Support]:
    """Fingerprint of what makes keys and values; a model without one is not fused."""
    try:
        weights = model_fingerprint(model)
    except Exception as error:
        weights = "unknown"
        reason = support.reason or f"its weights cannot be read: {shortened(error)}"
        support = replace(support, rotation=None, reason=reason)
    rotation = support.rotation
    turning = ([row.tolist() for row in rotation.inv_freq], rotation.adjacent) if rotation else None
    return digest(weights, tokenizer_fingerprint(tokenizer), codec, turning), support
