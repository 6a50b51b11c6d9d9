"""Pictures of evaluation rows: needle heat maps, fidelity against time, fidelity against ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from a3_engine.evaluation.rows import Row
from a3_engine.evaluation.summary import summarize
from a3_engine.fusion.selectors.full_prefill import FullPrefill

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for all kinds of colour vision, but for the yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
LABELS = {
    "kl_answer": "KL to full prefill over its answer, nats",
    "kl_first": "KL to full prefill at the first token, nats",
    "agreement": "tokens on which it agrees with full prefill",
    "nll_change": "change of the answer's NLL, nats a token",
    "recall": "recall of the needle's facts",
    "gold_nll": "NLL of the needle's answer, nats a token",
}
LINEAR = {"agreement"}
INCH = 3.8  # a panel's side


def needle_map(rows: Sequence[Row], value: str = "recall") -> Figure:
    """One panel a method and ratio: depth down, length across, the mean of ``value`` as colour."""
    rows = _of_task(rows, "needle", value)
    methods = list(dict.fromkeys((row["method"], row["ratio"]) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        place = (row["method"], row["ratio"], row["depth"], row["length"])
        cells.setdefault(place, []).append(row[value])
    means = {place: sum(values) / len(values) for place, values in cells.items()}
    low, high = (0.0, 1.0) if value == "recall" else (min(means.values()), max(means.values()))
    better_is_more = value == "recall"
    colours = "cividis" if better_is_more else "cividis_r"  # bright is good
    figure, panels = make_panels(len(methods))
    for panel, method in zip(panels, methods, strict=True):
        grid = [[means.get((*method, d, n), float("nan")) for n in lengths] for d in depths]
        image = panel.imshow(grid, vmin=low, vmax=high, cmap=colours, aspect="auto")
        for y, line in enumerate(grid):
            for x, mean in enumerate(line):
                dark = (mean < (low + high) / 2) == better_is_more
                colour = "white" if dark else "black"
                panel.text(x, y, f"{mean:.2f}", ha="center", va="center", color=colour, size=9)
        panel.set_title(f"{method[0]} @ {method[1]:g}")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        panel.set_xlabel("context, tokens")
        panel.set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label=LABELS[value], shrink=0.9)
    return figure


def pareto(rows: Sequence[Row], value: str = "kl_answer") -> Figure:
    """One panel a dataset: ``value`` against time to first token as a multiple of full prefill's.

    Both times are medians. The points of a method are its ratios, which stand beside them.
    """

    def place(summary: Row) -> float:
        return summary["ttft_s"] / summary["full_prefill_ttft_s"]

    figure = _curves(rows, value, place, "time to first token / full prefill's")
    for panel in figure.axes:
        panel.axvline(1.0, color="#777777", linestyle=":", linewidth=1)
        panel.set_xlim(left=0)
    return figure


def by_ratio(rows: Sequence[Row], value: str = "kl_answer") -> Figure:
    """One panel a dataset: ``value`` against the recompute ratio."""
    return _curves(rows, value, lambda summary: summary["ratio"], "recompute ratio")


PLOTS: dict[str, Callable[..., Figure]] = {
    "needle": needle_map,
    "pareto": pareto,
    "ratio": by_ratio,
}


def _curves(rows: Sequence[Row], value: str, place: Callable[[Row], float], label: str) -> Figure:
    compared = [row for row in rows if row["method"] != FullPrefill.name]  # the reference
    summaries = summarize(_of_task(compared, "fidelity", value))
    datasets = list(dict.fromkeys(summary["dataset"] for summary in summaries))
    methods = list(dict.fromkeys(summary["method"] for summary in summaries))
    figure, panels = make_panels(len(datasets))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for panel, dataset in zip(panels, datasets, strict=True):
        here = [summary for summary in summaries if summary["dataset"] == dataset]
        for index, method in enumerate(methods):
            points = sorted((s for s in here if s["method"] == method), key=place)
            places, heights = [place(point) for point in points], [p[value] for p in points]
            lows, highs = zip(*(point["ci95"][value] for point in points), strict=True)
            colour = COLOURS[index % len(COLOURS)]
            panel.vlines(places, lows, highs, color=colour, linewidth=0.8)
            panel.plot(places, heights, color=colour, linewidth=1.2)
            panel.scatter(
                places,
                heights,
                s=[25 + 250 * min(point["ratio"], 0.5) for point in points],
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                label=method,
                zorder=3,
            )
        if value not in LINEAR and all(summary["ci95"][value][0] > 0 for summary in here):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{height:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{dataset}, n = {max(summary['n'] for summary in here)}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    handles = {
        name: handle
        for panel in panels
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    figure.supxlabel(f"{label} (larger marks: larger ratio)", size="medium")
    figure.supylabel(LABELS[value], size="medium")
    return figure


def _of_task(rows: Sequence[Row], task: str, value: str) -> list[Row]:
    found = [row for row in rows if row["task"] == task]
    if not found:
        raise ValueError(f"There are no rows of `a3 eval {task}` to draw.")
    if len({row["engine"] for row in found}) > 1:
        raise ValueError(
            "The rows come from several models or encode prefixes, which one picture would mix. "
            "Give the files of one."
        )
    if value not in LABELS or value not in found[0]:
        known = ", ".join(name for name in LABELS if name in found[0])
        raise ValueError(f"Rows of {task} have no {value!r} to draw; there is {known}.")
    return found


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with this number of panels, at most four abreast."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed. Run: pip install 'a3-integrations[eval]'"
        ) from error
    across = min(count, 4)
    down = -(-count // across)
    figure = Figure(figsize=(INCH * across + 1.5, INCH * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]
