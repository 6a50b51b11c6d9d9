"""Many requests with churn: memory, file handles and disk stay where they were."""

from __future__ import annotations

import os
import time
from pathlib import Path

from a3_engine import A3Engine, StoreOptions
from tests.tiny import tiny_model, tiny_tokenizer

CORPUS = 601  # documents, of which the store holds a part
SIZE_LIMIT, MEMORY_LIMIT = 2_000_000, 500_000
RESIDENT_GROWTH, HANDLE_GROWTH = 32 * 2**20, 8


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def endure(folder: Path, requests: int, until: float) -> dict[str, int]:
    """Requests over a corpus that the store cannot hold; figures on the way and at the end."""
    engine = A3Engine.from_pretrained(
        tiny_model("llama"),
        tiny_tokenizer(),
        cache_dir=folder,
        codec="int8",
        size_limit=SIZE_LIMIT,
        store=StoreOptions(memory_limit=MEMORY_LIMIT),
    )
    figures = {"hits": 0, "misses": 0}
    resident, handles = [], []
    done = 0
    while done < requests and time.monotonic() < until:
        numbers = (done % 7, done * 13 % CORPUS, (done * 7 + 3) % CORPUS)
        texts = [
            f"Document {n} says that lamp {n * 7} burns through night {n * 13}. " * 4
            for n in numbers
        ]
        report = engine.generate("Which lamp burns?", chunks=texts, max_new_tokens=1).report
        figures["hits"] += report.hits
        figures["misses"] += report.misses
        done += 1
        if done % max(1, requests // 10) == 0:
            resident.append(_resident())
            handles.append(_handles())
    names = ("a fifth", "half", "the end")
    for name, at in zip(names, (len(resident) // 5, len(resident) // 2, -1), strict=True):
        figures[f"resident MiB at {name}"] = resident[at] // 2**20
        figures[f"handles at {name}"] = handles[at]
    figures |= {"requests": done, "disk": _disk(folder / "chunks")}
    assert engine.verify() == []
    engine.close()
    assert resident[-1] - resident[len(resident) // 5] < RESIDENT_GROWTH
    assert handles[-1] - handles[len(handles) // 5] <= HANDLE_GROWTH
    # The limit holds after each put; the write-ahead log comes on top.
    assert figures["disk"] < SIZE_LIMIT + 8 * 2**20
    return figures
