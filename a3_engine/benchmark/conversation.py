"""Conversations whose documents change at every turn: what of each prompt has to be computed.

The documents stand in the system message, as in a chat over retrieved context, so that every turn's
prompt differs from its first document on, and no prefix cache has more than the words before that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.fidelity import fidelity, reference_of
from a3_engine.messages import Chunk, Message
from a3_engine.method import Method

TURNS = 10
COMPARED = (2, 5, 10)  # turns whose answers are compared with a full prefill's
SYSTEM = "Answer each question in one short sentence, from these documents."

HEAD = (
    "turn", "prompt", "A³", "prefix cache", "nothing", "cached", "of history", "TTFT s", "full s",
    "sooner", "KL", "KL alone",
)  # fmt: skip

Row = dict[str, Any]


class Turn(NamedTuple):
    """One turn of one conversation; tokens, seconds and nats.

    ``behind_prefix`` is what an exact prefix cache that forgets nothing would leave to compute. The
    last four are None but at the turns that are compared; ``kl_alone`` is that of the same question
    and documents without a history.
    """

    number: int
    prompt_tokens: int
    cached_tokens: int
    history_tokens: int
    computed: int
    behind_prefix: int
    ttft_s: float
    full_ttft_s: float | None = None
    kl: float | None = None
    kl_alone: float | None = None


def measure_conversations(
    engine: A3Engine, groups: Sequence[Sequence[Example]], method: Method, answer_tokens: int
) -> Iterator[Turn]:
    """The turns of all conversations, one conversation after the other."""
    for examples in tqdm(groups, desc="conversations"):
        yield from converse(engine, examples, method, answer_tokens)


def converse(
    engine: A3Engine,
    examples: Sequence[Example],
    method: Method,
    answer_tokens: int,
    compared: Sequence[int] = COMPARED,
) -> Iterator[Turn]:
    """One conversation, a turn for each example; each brings its own documents."""
    said: list[Message] = []
    before: list[list[int]] = []
    for number, example in enumerate(examples, start=1):
        documents = [str(passage) for passage in example.passages]
        engine.precompute(documents, progress=False)
        system: list[str | Chunk] = [SYSTEM]
        for text in documents:
            system += ["\n\n", Chunk(text)]
        said.append(Message("user", example.question))
        prompt = engine.plan([Message("system", system), *said])
        alone = engine.plan([Message("system", system), said[-1]])
        settings: dict[str, Any] = {"selector": method.selector, "compression": method.compression}
        answer = engine.generate(prompt, max_new_tokens=answer_tokens, **settings)
        report = answer.report
        shared = max((_shared(prompt.ids, ids) for ids in before), default=0)
        turn = Turn(
            number,
            report.prompt_tokens,
            report.cached_tokens,
            report.history_tokens,
            report.fresh_tokens + report.created_tokens + report.recomputed_tokens,
            report.prompt_tokens - min(shared, report.prompt_tokens - 1),
            report.ttft_s,
        )
        if number in compared:
            reference = reference_of(engine, prompt, example.answers[0])
            single = reference_of(engine, alone, example.answers[0])
            turn = turn._replace(
                full_ttft_s=reference.ttft_s,
                kl=fidelity(engine, reference, method).kl_answer,
                kl_alone=fidelity(engine, single, method).kl_answer,
            )
        before.append([*prompt.ids, *engine.runtime.planner.tokenize_text(answer.text)])
        said.append(Message("assistant", answer.text))
        if engine.runtime.turns is not None:
            engine.runtime.turns.settle()
        yield turn


def conversations(examples: Sequence[Example], count: int, turns: int) -> list[list[Example]]:
    """Examples in groups of so many turns.

    Raises
    ------
    ValueError
        There are too few.
    """
    if len(examples) < count * turns:
        raise ValueError(
            f"{count} conversations of {turns} turns need {count * turns} questions; the data has "
            f"{len(examples)}."
        )
    return [list(examples[at * turns : (at + 1) * turns]) for at in range(count)]


def summary(turns: Sequence[Turn]) -> list[Row]:
    """Means over the conversations, one row a turn; times are medians."""
    rows = []
    for number in sorted({turn.number for turn in turns}):
        here = [turn for turn in turns if turn.number == number]
        row: Row = {"turn": number, "conversations": len(here)}
        for name in ("prompt_tokens", "history_tokens", "computed", "behind_prefix"):
            row[name] = round(statistics.fmean(getattr(turn, name) for turn in here), 1)
        shares = [turn.cached_tokens / turn.prompt_tokens for turn in here]
        row |= {"cached_share": round(statistics.fmean(shares), 3), "least_share": min(shares)}
        row["ttft_s"] = round(statistics.median(turn.ttft_s for turn in here), 4)
        for name, mean in (
            ("full_ttft_s", statistics.median),
            ("kl", statistics.fmean),
            ("kl_alone", statistics.fmean),
        ):
            values = [getattr(turn, name) for turn in here if getattr(turn, name) is not None]
            row[name] = round(mean(values), 5) if values else None
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [" ".join(f"{name:>12}" for name in HEAD)]
    for row in rows:
        full, kl = row["full_ttft_s"], row["kl"]
        cells = (
            f"{row['turn']}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['computed']:.0f}",
            f"{row['behind_prefix']:.0f}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['cached_share']:.0%}",
            f"{row['history_tokens']:.0f}",
            f"{row['ttft_s']:.3f}",
            "" if full is None else f"{full:.3f}",
            "" if full is None else f"{full / row['ttft_s']:.1f}x",
            "" if kl is None else f"{kl:.4f}",
            "" if kl is None else f"{row['kl_alone']:.4f}",
        )
        lines.append(" ".join(f"{cell:>12}" for cell in cells))
    return "\n".join([f"{rows[0]['conversations']} conversations; tokens computed a turn:", *lines])


def _shared(ids: Sequence[int], before: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(ids, before, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ids), len(before)))
