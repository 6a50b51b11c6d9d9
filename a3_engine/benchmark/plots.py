"""A benchmark as a picture: where each method's time to the first token goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from a3_engine.benchmark.requests import PARTS
from a3_engine.evaluation.plots import COLOURS, make_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stacked_parts(benchmark: dict[str, Any]) -> Figure:
    """One panel a context and chunk size, one bar a method and ratio, its parts stacked.

    A black line across a bar says how long it would be if its pass took no longer than the
    machine's limit.
    """
    rows = benchmark["results"]
    places = list(dict.fromkeys((row["context_tokens"], row["chunk_tokens"]) for row in rows))
    figure, panels = make_panels(len(places))
    for panel, place in zip(panels, places, strict=True):
        here = [row for row in rows if (row["context_tokens"], row["chunk_tokens"]) == place]
        bottoms = [0.0] * len(here)
        for part, colour in zip(PARTS, COLOURS, strict=False):
            heights = [row["parts_s"][part] for row in here]
            name = part.replace("_", " ")
            panel.bar(range(len(here)), heights, bottom=bottoms, color=colour, label=name)
            bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
        label = "with the pass at its limit"
        for bar, (row, height) in enumerate(zip(here, bottoms, strict=True)):
            if (roofline := row["roofline"]) is not None:
                taken = row["parts_s"]["recompute"] + row["parts_s"]["first_token"]
                reachable = height - taken + roofline["limit_s"]
                panel.hlines(reachable, bar - 0.4, bar + 0.4, color="black", label=label)
                label = "_"  # once in the legend
            panel.text(bar, height, f"{row['ttft_s']['median']:.2f}", ha="center", va="bottom")
        ticks = [f"{row['method']}\n@ {row['ratio']:g}" for row in here]
        panel.set_xticks(range(len(here)), ticks, rotation=30, ha="right", size=8)
        panel.set_title(f"{place[0]:,} tokens in chunks of {place[1]:,}", size="medium")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.supylabel("time to first token, s", size="medium")
    return figure


def computed_by_turn(rows: Sequence[dict[str, Any]]) -> Figure:
    """Tokens that are computed at each turn of a conversation, by what is kept of it."""
    figure, (panel,) = make_panels(1)
    lines = {"prompt_tokens": "nothing kept", "behind_prefix": "prefix cache", "computed": "A³"}
    for (name, label), colour in zip(lines.items(), COLOURS, strict=False):
        panel.plot(
            [row["turn"] for row in rows], [row[name] for row in rows], color=colour, label=label
        )
    panel.set_ylim(bottom=0)
    panel.set_xlabel("turn")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.supylabel("tokens computed", size="medium")
    return figure
