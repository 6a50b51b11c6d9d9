"""Prints the files that one request crosses from `A3LLM.complete` to the first token.

``python -m tests.hops`` with the tiny model; docs/architecture.md states the numbers.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from a3_engine import A3Engine
from a3_integrations.llama_index import A3LLM
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = (str(ROOT / "a3_engine"), str(ROOT / "a3_integrations"))
TEXTS = ("The lamp of the lighthouse burns all night.", "The northern shore is steep and dark.")


def walk(llm: A3LLM, prompt: str) -> list[tuple[str, str]]:
    """Every distinct call from a file into another, in the order of its first time."""
    edges: dict[tuple[str, str, str], tuple[str, str]] = {}

    def follow(frame: FrameType, event: str, arg: Any) -> None:
        caller = frame.f_back
        if event != "call" or caller is None:
            return
        there, here = frame.f_code.co_filename, caller.f_code.co_filename
        while not here.startswith(PACKAGES) and caller.f_back is not None:  # through libraries
            caller = caller.f_back
            here = caller.f_code.co_filename
        if here != there and here.startswith(PACKAGES) and there.startswith(PACKAGES):
            short = [str(Path(name).relative_to(ROOT)) for name in (here, there)]
            edges.setdefault((short[0], short[1], frame.f_code.co_qualname), (short[0], short[1]))

    sys.setprofile(follow)
    try:
        llm.complete(prompt, max_new_tokens=1)
    finally:
        sys.setprofile(None)
    return list(edges.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = A3Engine.from_pretrained(tiny_model("llama"), tiny_tokenizer(), cache_dir=folder)
        llm = A3LLM(engine=engine)
        engine.precompute(TEXTS, progress=False)
        prompt = "\n\n".join([*TEXTS, "Who keeps the lamp?"])
        llm.complete(prompt, max_new_tokens=1)
        engine.runtime.prefix_cache.clear()
        edges = walk(llm, prompt)
        files = {name for edge in edges for name in edge}
        print(f"{len(files)} files, {len(set(edges))} pairs, {len(edges)} calls between files")
        for name, times in Counter(there for _, there in set(edges)).most_common():
            print(f"{times:4} files call into {name}")
        engine.close()


if __name__ == "__main__":
    main()
