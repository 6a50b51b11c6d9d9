"""The prompts of a run: the same real chunks in every round, in another order, and a question."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from a3_engine import Message
from a3_engine.evaluation.datasets import articles, sample_examples
from a3_engine.prompt import PromptPlanner


def requests(
    planner: PromptPlanner, context_tokens: int, chunk_tokens: int, same_order: bool
) -> Iterator[dict[str, Any]]:
    """What the workers are asked, round by round: ``ids`` and ``chunks``, as `worker` says."""
    examples = sample_examples()
    text = "\n\n".join(p for _, paragraphs in articles(examples) for p in paragraphs)
    ids = planner.tokenize_text(text)
    if len(ids) < context_tokens:
        raise SystemExit(f"The sample has {len(ids)} tokens; --context goes up to that.")
    chunks = [
        ids[start : min(start + chunk_tokens, context_tokens)]
        for start in range(0, context_tokens, chunk_tokens)
    ]
    orders = random.Random(0)
    for example in examples:
        head, *rest = planner.plan([Message("user", f"\n\n{example.question}")]).segments
        prompt, spans = list(head.ids), []
        for chunk in chunks:
            spans.append((len(prompt), len(prompt) + len(chunk)))
            prompt += chunk
        yield {"ids": prompt + [token for part in rest for token in part.ids], "chunks": spans}
        if not same_order:
            orders.shuffle(chunks)
