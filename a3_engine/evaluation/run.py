"""Running methods over examples, row by row, resumable after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.rows import Row, append_row, read_rows
from a3_engine.evaluation.tasks import make_task
from a3_engine.evaluation.tasks.base import Task
from a3_engine.method import Method

# What tells one row from another. A record made by another model or prefix is not taken over, nor
# one of another text under the same id (`content`), or of a method with other `settings`.
IDENTITY = ("engine", "task", "dataset", "id", "content", "method", "settings")


def evaluate(
    engine: A3Engine,
    task: str | Task,
    examples: Sequence[Example],
    methods: Sequence[Method],
    record: Path | None = None,
    *,
    progress: bool = True,
) -> list[Row]:
    """One row for every example and method.

    Parameters
    ----------
    task : str or Task
        See ``a3_engine.evaluation.tasks``.
    record : path or None
        JSON lines; every row is appended when it is done, and rows found there are not run again.

    Returns
    -------
    list of dict
        The fields of `IDENTITY`, and the task's figures.
    """
    task = make_task(task)
    done = {_key(row): row for row in read_rows(record)} if record and record.exists() else {}
    rows: list[Row] = []
    for example in tqdm(examples, desc=task.name, unit="example", disable=not progress):
        content = hashlib.sha256(repr(example).encode()).hexdigest()[:12]
        missing = []
        for method in methods:
            row = {
                "engine": engine.fingerprint[:16],
                "task": task.name,
                "dataset": example.dataset,
                "id": example.id,
                "content": content,
                "method": method.name,
                "ratio": method.selector.ratio,
                "settings": hashlib.sha256(repr(method).encode()).hexdigest()[:12],
            }
            if _key(row) in done:
                rows.append(done[_key(row)])
            else:
                missing.append((method, row | dict(example.labels)))
        if not missing:
            continue
        # Computing chunks belongs to ingestion, not to any method's time.
        engine.precompute([str(passage) for passage in example.passages], progress=False)
        figures = task.measure(engine, example, [method for method, _ in missing])
        for (_, row), each in zip(missing, figures, strict=True):
            rows.append(row | each)
            if record:
                append_row(record, rows[-1])
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in IDENTITY)
