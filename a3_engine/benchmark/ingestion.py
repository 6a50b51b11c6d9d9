"""How fast chunks are computed and stored, beside a plain batched forward of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from a3_engine.benchmark.rates import now
from a3_engine.benchmark.requests import spread
from a3_engine.engine import A3Engine
from a3_engine.prompt import Chunk

TAG = "a3-bench"


def measure_ingestion(engine: A3Engine, chunks: Sequence[str], repeats: int) -> dict[str, Any]:
    """Tokens a second of both, taking turns; the first round warms up and is not counted.

    Ingestion ends when all chunks are durable. The plain forward computes the chunks of the first
    one's length as one batch, with a cache and without logits, and stores nothing.

    Returns
    -------
    dict
        ``ingest_per_s`` and ``forward_per_s`` (medians with their spread), and ``ratio``, the
        median of a round's ratios.
    """
    planner, decoder = engine.runtime.planner, engine.runtime.model.get_decoder()
    ids = {text: planner.chunk_ids(text) for text in chunks}
    n_tokens = len(ids[chunks[0]])
    same = [text for text, tokens in ids.items() if len(tokens) == n_tokens]
    device = engine.runtime.model.device
    batch = torch.tensor([ids[text] for text in same], device=device)
    ingested, forwarded = [], []
    for turn in range(repeats + 1):
        engine.evict(TAG)
        started = now(device)
        engine.precompute([Chunk(text, TAG) for text in same], progress=False)
        stored = now(device)
        with torch.inference_mode():
            decoder(input_ids=batch, use_cache=True)
        ended = now(device)
        if turn:
            ingested.append(batch.numel() / (stored - started))
            forwarded.append(batch.numel() / (ended - stored))
    ratios = [ours / plain for ours, plain in zip(ingested, forwarded, strict=True)]
    return {
        "chunk_tokens": n_tokens,
        "chunks": len(same),
        "ingest_per_s": spread(ingested, 1),
        "forward_per_s": spread(forwarded, 1),
        "ratio": spread(ratios),
    }
