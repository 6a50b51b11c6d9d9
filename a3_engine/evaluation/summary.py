"""Means of rows with their intervals, and paired differences between methods."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from a3_engine.evaluation.metrics import bootstrap
from a3_engine.evaluation.rows import Row
from a3_engine.fusion.selectors.a3 import A3

Group = tuple[str, str, float]
DIGITS = 5


def summarize(rows: Sequence[Row]) -> list[Row]:
    """One line for every dataset, method and ratio.

    Floats are means, ``nll_change`` of its absolute value; times (``*_s``) are medians. ``ci95``
    holds 95 % bootstrap intervals of the means. ``paired`` compares with ``a3`` at the same ratio,
    at another where there is none, or with the first method: the mean difference on the examples
    that both have, with the bounds of its interval.
    """
    groups: dict[Group, dict[tuple[str, str], Row]] = {}
    for row in rows:
        members = groups.setdefault((row["dataset"], row["method"], row["ratio"]), {})
        members[row["id"], row.get("content", "")] = row
    summaries = []
    for group, members in groups.items():
        dataset, method, ratio = group
        summary: Row = {"dataset": dataset, "method": method, "ratio": ratio, "n": len(members)}
        intervals = {}
        for name in _figures(members):
            values = [_value(row, name) for row in members.values()]
            if name.endswith("_s"):
                summary[name] = round(statistics.median(values), 4)
            else:
                summary[name] = round(statistics.fmean(values), DIGITS)
                intervals[name] = [round(bound, DIGITS) for bound in bootstrap(values)]
        summary["ci95"] = intervals
        baseline = _baseline(group, list(groups))
        if baseline != group:
            summary["paired"] = {
                "method": baseline[1],
                "ratio": baseline[2],
                **_differences(members, groups[baseline], list(intervals)),
            }
        summaries.append(summary)
    return summaries


def _figures(members: dict[tuple[str, str], Row]) -> list[str]:
    first = next(iter(members.values()))
    return [name for name, value in first.items() if isinstance(value, float) and name != "ratio"]


def _value(row: Row, name: str) -> float:
    return abs(row[name]) if name == "nll_change" else row[name]


def _baseline(group: Group, groups: Sequence[Group]) -> Group:
    dataset, _, ratio = group
    here = [other for other in groups if other[0] == dataset]
    ours = [other for other in here if other[1] == A3.name]
    same = [other for other in ours if other[2] == ratio]
    return [*same, *ours, *here][0]


def _differences(
    members: dict[tuple[str, str], Row], baseline: dict[tuple[str, str], Row], names: Sequence[str]
) -> dict[str, list[float]]:
    shared = [key for key in members if key in baseline]
    differences = {}
    for name in names:
        values = [_value(members[key], name) - _value(baseline[key], name) for key in shared]
        if values:
            mean = statistics.fmean(values)
            differences[name] = [round(x, DIGITS) for x in (mean, *bootstrap(values))]
    return differences
