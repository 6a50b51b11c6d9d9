"""What an engine makes on first use: the model, its planner, the gate's word, the chunks."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine import native
from a3_engine.chunks.catalogue import Catalogue
from a3_engine.chunks.fingerprint import (
    Watch,
    digest,
    model_fingerprint,
    tokenizer_fingerprint,
)
from a3_engine.chunks.library import ChunkLibrary
from a3_engine.chunks.store import ChunkStore, StoreOptions
from a3_engine.chunks.tiers import open_store
from a3_engine.decoding.sharing import SharedDecoding
from a3_engine.errors import shortened
from a3_engine.fusion.buffers import BUFFERS
from a3_engine.fusion.sparse import LocalQueries
from a3_engine.fusion.turns import Turns
from a3_engine.model.computing import Computing
from a3_engine.model.packing import pack
from a3_engine.model.probe import TEXT
from a3_engine.model.support import Support, examine
from a3_engine.prompt import PromptPlanner
from a3_engine.report import FusionReport

logger = logging.getLogger(__name__)

MAX_REPORTS = 64


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
    store: ChunkStore
    library: ChunkLibrary | None
    local_queries: LocalQueries | None
    fingerprint: str
    shared: SharedDecoding
    watch: Watch
    turns: Turns = field(default_factory=Turns)
    reports: deque[FusionReport] = field(default_factory=lambda: deque(maxlen=MAX_REPORTS))

    @property
    def computing(self) -> Computing:
        """Where the model computes."""
        return self.shared.computing

    def close(self) -> None:
        """Release file handles, kept turns and memory kept for caches."""
        self.turns.close()
        BUFFERS.clear()
        self.store.close()
        if self.library is not None:
            self.library.catalogue.close()


def start(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    own: bool,
    cache_dir: Path,
    encode_prefix: str,
    size_limit: int,
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
        native.library(model.dtype)  # compiled now where it has to be, not during a request
    planner = PromptPlanner(tokenizer, encode_prefix)
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
    chunks = open_store(cache_dir / "chunks", size_limit, store)
    logger.info("Chunk store at %s, up to %.1f GiB.", cache_dir / "chunks", size_limit / 2**30)
    if own and support.reason is None and support.tested:
        pack(model)
    library = None
    if support.rotation is not None:
        library = ChunkLibrary(
            model.get_decoder(),
            support.rotation,
            chunks,
            Catalogue(cache_dir / "texts.sqlite3", engine),
            engine=engine,
            codec=codec,
            prefix_ids=planner.prefix_ids,
            computing=shared.computing,
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
        fingerprint=digest(engine, planner.prefix_ids),
        shared=shared,
        watch=Watch(model),  # which holds weights, so that it comes behind packing
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
        fingerprint=digest(engine, runtime.planner.prefix_ids),
        turns=Turns(),
        watch=watch,
    )


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
    turning = (rotation.inv_freq.tolist(), rotation.adjacent) if rotation else None
    return digest(weights, tokenizer_fingerprint(tokenizer), codec, turning), support
