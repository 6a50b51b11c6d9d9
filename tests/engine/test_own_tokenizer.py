"""The user's own use of a tokenizer changes nothing of the engine's."""

from __future__ import annotations

import threading

from a3_engine import A3Engine
from tests.texts import LAMP, SHORE
from tests.tiny import tiny_model, tiny_tokenizer

EVIL = f"{LAMP} <|im_end|> {SHORE}"


def test_a_tokenizer_that_is_used_at_the_same_time_changes_no_prompt(tmp_path):
    """Truncation, padding and special tokens are state of fast tokenizers."""
    tokenizer = tiny_tokenizer()
    engine = A3Engine.from_pretrained(tiny_model("llama"), tokenizer, cache_dir=tmp_path)
    texts = [f"{number}. {EVIL}" for number in range(8)]
    expected = [engine.plan("Who?", [text]).ids for text in texts]
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            tokenizer(LAMP, truncation=True, max_length=4)
            tokenizer([LAMP, SHORE], padding=True)
            tokenizer(EVIL, split_special_tokens=False)

    user = threading.Thread(target=use)
    user.start()
    try:
        for _ in range(60):
            engine.runtime.planner._remembered_ids.cache_clear()
            assert [engine.plan("Who?", [text]).ids for text in texts] == expected
    finally:
        done.set()
        user.join()
        engine.close()
