"""Running methods over examples, row by row, resumable after a kill."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.fidelity import example_prompt, fidelity, full_prefill
from a3_engine.evaluation.metrics import bootstrap, exact_match, f1
from a3_engine.fusion.selectors.base import Selector
from a3_engine.fusion.selectors.full_prefill import FullPrefill

Task = Literal["fidelity", "qa"]
Row = dict[str, Any]
QA_TOKENS = 32
# What tells one row from another; a record made by another model or prefix is not taken over.
IDENTITY = ("engine", "task", "dataset", "id", "method", "ratio")


def evaluate(
    engine: A3Engine,
    task: Task,
    examples: Sequence[Example],
    selectors: Sequence[Selector],
    record: Path | None = None,
    *,
    progress: bool = True,
) -> list[Row]:
    """One row for every example and method.

    Parameters
    ----------
    record : path or None
        JSON lines; every row is appended when it is done, and rows found there are not run again.

    Returns
    -------
    list of dict
        The fields of `IDENTITY`, and the task's figures.
    """
    done = _read(record)
    rows: list[Row] = []
    for example in tqdm(examples, desc=task, unit="question", disable=not progress):
        keys = {_key(_row(engine, task, example, selector)): selector for selector in selectors}
        rows += [done[key] for key in keys if key in done]
        missing = {key: selector for key, selector in keys.items() if key not in done}
        if missing:
            for row in _run(engine, task, example, list(missing.values())):
                rows.append(row)
                _append(record, row)
    return rows


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Means by dataset, method and ratio, with 95 % bootstrap intervals; medians of times.

    ``nll_change`` is the mean absolute change. QA adds ``f1_change``, the paired difference to
    full prefill where that was run too.
    """
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["method"], row["ratio"]), []).append(row)
    summaries = []
    for (dataset, method, ratio), members in groups.items():
        summary: Row = {"dataset": dataset, "method": method, "ratio": ratio, "n": len(members)}
        names = [name for name, value in members[0].items() if isinstance(value, float)]
        intervals = {}
        for name in sorted(set(names) - {"ratio"}, key=names.index):
            values = [row[name] for row in members]
            if name.endswith("_s"):
                summary[name] = round(statistics.median(values), 4)
                continue
            values = [abs(value) for value in values] if name == "nll_change" else values
            summary[name] = round(statistics.fmean(values), 5)
            intervals[name] = [round(bound, 5) for bound in bootstrap(values)]
        full = {row["id"]: row for row in groups.get((dataset, FullPrefill.name, 1.0), [])}
        if "f1" in summary and full and method != FullPrefill.name:
            changes = [row["f1"] - full[row["id"]]["f1"] for row in members if row["id"] in full]
            summary["f1_change"] = round(statistics.fmean(changes), 5)
            intervals["f1_change"] = [round(bound, 5) for bound in bootstrap(changes)]
        summaries.append(summary | {"ci95": intervals})
    return summaries


def _run(
    engine: A3Engine, task: Task, example: Example, selectors: Sequence[Selector]
) -> list[Row]:
    _store_chunks(engine, example)
    if task == "qa":
        return [_answer(engine, example, selector) for selector in selectors]
    reference = full_prefill(engine, example)
    return [
        _row(engine, "fidelity", example, selector)
        | asdict(fidelity(engine, reference, selector))
        | {"full_prefill_ttft_s": reference.ttft_s}
        for selector in selectors
    ]


def _store_chunks(engine: A3Engine, example: Example) -> None:
    """Computing chunks belongs to ingestion, not to any method's time."""
    engine.precompute([str(passage) for passage in example.passages], progress=False)


def _answer(engine: A3Engine, example: Example, selector: Selector) -> Row:
    prompt = example_prompt(engine, example)
    answer = engine.generate(prompt, selector=selector, max_new_tokens=QA_TOKENS, stop=("\n",))
    return _row(engine, "qa", example, selector) | {
        "em": exact_match(answer.text, example.answers),
        "f1": f1(answer.text, example.answers),
        "ttft_s": answer.report.ttft_s,
        "answer": answer.text,
    }


def _row(engine: A3Engine, task: Task, example: Example, selector: Selector) -> Row:
    return {
        "engine": engine.fingerprint[:16],
        "task": task,
        "dataset": example.dataset,
        "id": example.id,
        "method": selector.name,
        "ratio": selector.ratio,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in IDENTITY)


def _read(record: Path | None) -> dict[tuple[Any, ...], Row]:
    if record is None or not record.exists():
        return {}
    rows = []
    for line in record.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that a kill cut short
            continue
    return {_key(row): row for row in rows}


def _append(record: Path | None, row: Row) -> None:
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
