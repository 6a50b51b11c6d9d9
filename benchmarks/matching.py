"""How long it takes to find known chunks inside a finished prompt.

Twenty of the stored texts stand in a prompt of 16,000 characters, amid others that nobody stored.
Two catalogues are measured: texts with nothing in common, and texts that all begin with the same
metadata and end with the same words, as those of one document store often do. The clock holds
what a request pays: asking the database for news, and the search. Reading all texts for the first
time is reported apart; a process pays for it once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from a3_engine.chunks.text_index import TextIndex
from a3_engine.chunks.tiers.disk import DiskStore

HEAD = "source: handbook/maintenance/2026.pdf\nlanguage: en\n\n"
TAIL = "\n\nSee the appendix for the terms of use."


def make_text(random_: random.Random, words: list[str], alike: bool) -> str:
    body = " ".join(random_.choices(words, k=random_.randint(60, 120)))
    return f"{HEAD}{body}{TAIL}" if alike else body


def make_prompt(random_: random.Random, known: list[str], other: list[str], chars: int) -> str:
    """Known and other texts in random order, with glue that fills up the prompt."""
    parts = known + other
    random_.shuffle(parts)
    text = "\n\n".join(parts)
    return (text + " What does this mean?" * chars)[: max(chars, len(text))]


def measure(stored: int, found: int, chars: int, repeats: int, alike: bool) -> dict[str, object]:
    random_ = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(random_.choices(letters, k=random_.randint(2, 10))) for _ in range(5000)]
    texts = [make_text(random_, words, alike) for _ in range(stored)]
    with tempfile.TemporaryDirectory(prefix="a3-matching-") as folder:
        store = DiskStore(Path(folder) / "chunks")
        text_index = TextIndex(store, "benchmark")
        bar = tqdm(texts, desc="Storing texts", file=sys.stderr)
        text_index.add((text, f"{number:064x}", None) for number, text in enumerate(bar))
        text_index.write()
        started = time.perf_counter()
        text_index.find("")
        first_s = time.perf_counter() - started
        times = []
        length = 0
        for _ in tqdm(range(repeats), desc="Searching", file=sys.stderr):
            known = random_.sample(texts, found)
            other = [make_text(random_, words, alike)[:-1] + "#" for _ in range(2)]
            prompt = make_prompt(random_, known, other, chars)
            length = len(prompt)
            started = time.perf_counter()
            matches = text_index.find(prompt)
            times.append(time.perf_counter() - started)
            assert sorted(prompt[m.start : m.stop] for m in matches) == sorted(known)
        store.close()
    return {
        "texts": "alike at both ends" if alike else "different",
        "stored": stored,
        "found": found,
        "prompt_chars": length,
        "first_s": round(first_s, 3),
        "median_ms": round(1000 * statistics.median(times), 2),
        "max_ms": round(1000 * max(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", type=int, default=100_000)
    parser.add_argument("--found", type=int, default=20)
    parser.add_argument("--chars", type=int, default=16_000)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    for alike in (False, True):
        print(json.dumps(measure(**vars(options), alike=alike)), flush=True)


if __name__ == "__main__":
    main()
