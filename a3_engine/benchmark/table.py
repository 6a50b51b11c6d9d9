"""A benchmark's figures as text."""

from __future__ import annotations

from typing import Any

from a3_engine.benchmark.requests import PARTS
from a3_engine.fusion.selectors.full_prefill import FullPrefill

Row = dict[str, Any]


def tables(benchmark: Row) -> str:
    """All that ``run`` found, for a terminal; ratios are to full prefill's of the same context."""
    machine, rates = benchmark["machine"], benchmark["rates"]
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"{where}; {machine['dtype']}; {'with' if machine['loops'] else 'without'} loops in C++; "
        f"torch {machine['torch']}; matrix products {rates['matmul'] / 1e9:,.0f} GFLOP/s, "
        f"copies {rates['copy'] / 1e9:.1f} GB/s, {rates['new_copy'] / 1e9:.1f} into new memory"
    ]
    for row in benchmark["results"]:
        place = (row["context_tokens"], row["chunk_tokens"])
        if not lines[-1].startswith(" "):
            lines += ["", _line(HEAD)]
        lines.append(_line(_cells(row, _reference(benchmark["results"], place))))
    lines += ["", "ingestion, tokens/s (median)"]
    lines += [
        f"  {each['chunks']} chunks of {each['chunk_tokens']}: "
        f"{each['ingest_per_s']['median']:,.0f} computed and stored, "
        f"{each['forward_per_s']['median']:,.0f} by a plain batched forward: "
        f"{each['ratio']['median']:.2f} times"
        for each in benchmark["ingestion"]
    ]
    lines += [
        f"decoding at {each['context_tokens']}, tokens/s (median): "
        f"{each['one_per_s']['median']:.1f} after the first, "
        f"{each['generate_per_s']['median']:.1f} by transformers' generate; in steps of one "
        f"{each['step_per_s']['median']:.1f}, of {each['requests']} "
        f"{each['steps_per_s']['median']:.1f}; with the prefill "
        f"{each['request_per_s']['median']:.1f} of one request, "
        f"{each['at_once_per_s']['median']:.1f} of {each['requests']} at once"
        for each in benchmark["decoding"]
    ]
    return "\n".join(lines)


HEAD = (
    "context", "chunk", "method", "ratio", "TTFT s", "least", "most", "speedup", *PARTS, "tok/s",
    "read MB", "peak MB", "x limit", "x shapes", "x copy", "x new",
)  # fmt: skip
WIDTHS = (8, 6, 18, 6, 8, 8, 8, 7, 7, 7, 7, 10, 12, 7, 7, 8, 8, 8, 9, 7, 7)


def _reference(results: list[Row], place: tuple[int, int]) -> float | None:
    for row in results:
        here = (row["context_tokens"], row["chunk_tokens"])
        if here == place and row["method"] == FullPrefill.name:
            return float(row["ttft_s"]["median"])
    return None


def _cells(row: Row, reference: float | None) -> tuple[str, ...]:
    times, roofline = row["ttft_s"], row["roofline"]
    return (
        f"{row['context_tokens']}",
        f"{row['chunk_tokens']}",
        row["method"],
        f"{row['ratio']:g}",
        *(f"{times[name]:.3f}" for name in ("median", "min", "max")),
        f"{reference / times['median']:.1f}x" if reference else "",
        *(f"{row['parts_s'][part]:.3f}" for part in PARTS),
        f"{row['decode_per_s']['median']:.1f}" if row["decode_per_s"] else "",
        f"{row['bytes_read'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] is not None else "",
        f"{roofline['pass_to_limit']:.2f}" if roofline else "",
        f"{roofline['pass_to_limit_at_shapes']:.2f}" if roofline else "",
        f"{row['load_to_copy']:.2f}" if row["load_to_copy"] else "",
        f"{row['load_to_new_copy']:.2f}" if row["load_to_new_copy"] else "",
    )


def _line(cells: tuple[str, ...]) -> str:
    pairs = zip(cells, WIDTHS, strict=True)
    return " " + " ".join(cell.rjust(width) for cell, width in pairs).rstrip()
