"""Rows of results as JSON lines: appended one by one, read back whatever a kill cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a file, in order."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that a kill cut short
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a row, on a line of its own even after one that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut + json.dumps(row, ensure_ascii=False).encode() + b"\n")
