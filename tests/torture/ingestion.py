"""Ingesting a large corpus of many lengths: memory stays level."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from a3_engine import A3Engine
from tests.tiny import LONG, tiny_model, tiny_tokenizer
from tests.torture.endurance import _handles, _resident

AT_ONCE = 256
RESIDENT_GROWTH = 24 * 2**20


def ingest(folder: Path, passages: int, until: float) -> dict[str, int]:
    """Precompute passages of 20 to some 300 tokens; figures on the way and at the end."""
    model = tiny_model(LONG, torch.bfloat16)
    engine = A3Engine.from_pretrained(model, tiny_tokenizer(), cache_dir=folder, stand_in="none")
    rng, done, resident = random.Random(0), 0, []
    while done < passages and time.monotonic() < until:
        lengths = [round(min(400, max(40, rng.gauss(250, 120)))) for _ in range(AT_ONCE)]
        texts = [rng.randbytes(length // 2).hex() for length in lengths]
        done += engine.precompute(texts, progress=False).computed
        resident.append(_resident())
    figures = {"passages": done, "handles": _handles()}
    for name, at in (("the first", 0), ("a quarter", len(resident) // 4), ("the end", -1)):
        figures[f"resident MiB at {name}"] = resident[at] // 2**20
    engine.close()
    assert resident[-1] - resident[len(resident) // 4] < RESIDENT_GROWTH, figures
    return figures
