"""What models and machines that are not here would make of it: simulated, never measured.

`python -m benchmarks.simulate --contexts 4096,32768 --ratio 0.15`

Published peak rates, times explicit efficiencies, divide the counts of `roofline.py`. The steps
come one after the other, as in the engine: a tier is read, the codec decoded on the host, keys
and values copied to the device and turned there, the question scored over a third of the layers,
and the rows computed and the other tokens moved (`mend`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any, NamedTuple

import torch

from a3_engine.benchmark.roofline import Part, Shape, Work, work
from a3_engine.chunks.codecs import CODECS, DEFAULT_CODEC
from a3_engine.fusion.selectors.mend import SHARED, WINDOW, Mend
from a3_engine.model.masks import LocalGlobal

BF16 = 2  # bytes
CHUNK_TOKENS = 512
FRESH_TOKENS = 64  # template and question, after the chunks
TURNING = 2  # keys are read and written once more
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """One accelerator by its data sheet.

    Parameters
    ----------
    tflops : float
        Peak dense bf16 matrix products, 10^12 operations a second.
    memory_gb_s, memory_gb : float
        Bandwidth and size of its memory, 10^9 bytes (a second).
    to_device_gb_s : float
        From the host's memory, one way; infinite where both share one memory.
    source : str
        Where the figures stand.
    """

    name: str
    tflops: float
    memory_gb_s: float
    memory_gb: float
    to_device_gb_s: float
    source: str


@dataclass(frozen=True)
class Tier:
    """Where chunks are read from, 10^9 bytes a second."""

    name: str
    gb_s: float
    source: str


@dataclass(frozen=True)
class Efficiency:
    """What of the published rates arrives. Defaults are assumptions unless a source is named.

    Parameters
    ----------
    linear : float
        Of the peak, in linear layers of some hundred rows or more.
    dense_attention : float
        Of the peak, in the attention of a full prefill (only the triangle that is needed counts).
    row_attention : float
        Of the peak, in the attention of scattered rows: half of a dense one's under an explicit
        mask, and again about half of that, since what the mask hides is computed too.
    memory, transfer : float
        Of the bandwidths of memory, and of bus, disk and network.
    layer_s : float
        Least seconds of one layer of one pass: an eager model launches some dozen kernels.
    repair_passes : float
        How often moving the tokens that are not computed reads or writes all keys and values.
    host_cores : int
        That decode.
    decode_gb_s : mapping
        10^9 bytes of bf16 that one core decodes a second, by codec; see docs/performance.md.
    """

    linear: float = 0.6
    dense_attention: float = 0.3
    row_attention: float = 0.1
    memory: float = 0.8
    transfer: float = 0.8
    layer_s: float = 0.0005
    repair_passes: float = 12.0
    host_cores: int = 8
    decode_gb_s: Mapping[str, float] = field(
        default_factory=lambda: {"raw": inf, "int8": 0.40, "int4": 0.29}
    )


@dataclass(frozen=True)
class Times:
    """Simulated seconds."""

    prefill: float
    read: float
    decode: float
    copy: float
    select: float
    compute: float

    @property
    def behind_tier(self) -> float:
        """All of fusion but reading."""
        return self.decode + self.copy + self.select + self.compute

    @property
    def fusion(self) -> float:
        return self.read + self.behind_tier

    @property
    def speedup(self) -> float:
        """Full prefill's time to first token as a multiple of fusion's."""
        return self.prefill / self.fusion

    @property
    def slowest(self) -> str:
        """The step that takes longest."""
        steps = ("read", "decode", "copy", "select", "compute")
        return max(steps, key=lambda step: float(getattr(self, step)))


MODELS: dict[str, Shape] = {  # of their published config.json
    "Llama-3.1-8B": Shape(32, 4096, 32, 8, 128, 14_336, 128_256),
    "Qwen3-32B": Shape(64, 5120, 64, 8, 128, 25_600, 151_936),
}
# A bus's published rate counts both directions; half of it is one way.
MACHINES = (
    Machine("A100 80GB SXM", 312, 2039, 80, 32, "NVIDIA A100 data sheet"),
    Machine("H100 SXM", 989.5, 3350, 80, 64, "NVIDIA H100 data sheet, half of the sparse rate"),
    Machine("RTX 4090", 165.2, 1008, 24, 32, "NVIDIA Ada architecture white paper, appendix A"),
    Machine(
        "M2 Ultra",
        27.2,
        800,
        192,
        inf,
        "Apple newsroom, June 2023, which has no matrix rate: 76 cores, 128 lanes, 2 x 1.4 GHz",
    ),
)
NVME = Tier("NVMe", 7.45, "Samsung 990 PRO data sheet, sequential read")
TIERS = (
    Tier("10 Gb/s network", 1.25, "line rate"),
    NVME,
    Tier("100 Gb/s network", 12.5, "line rate"),
    Tier("host memory", inf, "only the copy to the device counts"),
)
TABLED = ("raw", "int8", "int4")


def stored_bytes(shape: Shape, context: int, codec: str) -> float:
    """Bytes that a context's chunks take in a tier."""
    states = (shape.layers, shape.kv_heads, CHUNK_TOKENS, shape.head_dim)
    layout = CODECS[codec].layout(states, states, torch.bfloat16)
    chunk = sum(prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())
    return chunk * context / CHUNK_TOKENS


def fits(shape: Shape, machine: Machine, context: int) -> bool:
    """Whether weights, two tables of embeddings among them, and one request's cache fit."""
    weights = BF16 * (shape.weights + shape.hidden * shape.vocabulary)
    return weights + stored_bytes(shape, context, DEFAULT_CODEC) < machine.memory_gb * GIGA


def simulate(
    shape: Shape,
    machine: Machine,
    *,
    context: int,
    ratio: float,
    codec: str = DEFAULT_CODEC,
    tier_gb_s: float = inf,
    efficiency: Efficiency | None = None,
) -> Times:
    """Time to first token of a full prefill, and of fusion step by step.

    Parameters
    ----------
    context : int
        Tokens of the chunks; a question of 64 stands after them.
    ratio : float
        Of them that are computed again, evenly spread; fewer in the upper layers, as `mend` does.
    tier_gb_s : float
        What the tier reads, 10^9 bytes a second.
    """
    how = efficiency or Efficiency()
    memory = machine.memory_gb_s * GIGA * how.memory
    peak = machine.tflops * TERA

    def seconds(needed: Work, attention: float, layers: int) -> float:
        rates = peak * how.linear, memory, peak * attention
        return needed.seconds(*rates) + layers * how.layer_s

    n_tokens = context + FRESH_TOKENS
    fresh = torch.arange(context, n_tokens)
    n_recomputed, share = int(ratio * context), 1.0
    kept_per_layer = Mend().kept_per_layer(shape.layers) if ratio < 1 else {}
    rows = []
    for layer in range(shape.layers):
        share = kept_per_layer.get(layer, share)
        recomputed = torch.linspace(0, context - 1, round(share * n_recomputed)).long()
        rows.append(torch.cat([recomputed, fresh]))
    n_lower = len(Mend().layers(shape.layers))
    lower = replace(shape, layers=n_lower, windows=shape.windows[:n_lower])
    raw = stored_bytes(shape, context, DEFAULT_CODEC)
    select = compute = 0.0
    if ratio > 0:
        scoring = replace(work(lower, [fresh] * lower.layers, BF16), logits=Part(0.0, 0.0))
        select = seconds(scoring, how.row_attention, lower.layers)
        compute = how.repair_passes * raw / memory
    first = Mend().local_from(shape.layers, context) if 0 < ratio < 1 else None
    shared = torch.linspace(0, context - 1, min(SHARED * n_recomputed, context)).long()
    local_global = None if first is None else (first, LocalGlobal(shared, WINDOW, context))
    compute += seconds(work(shape, rows, BF16, local_global), how.row_attention, shape.layers)
    everything = [torch.arange(n_tokens)] * shape.layers
    return Times(
        prefill=seconds(work(shape, everything, BF16), how.dense_attention, shape.layers),
        read=stored_bytes(shape, context, codec) / (tier_gb_s * GIGA * how.transfer),
        decode=raw / (how.decode_gb_s[codec] * how.host_cores * GIGA),
        copy=raw / (machine.to_device_gb_s * GIGA * how.transfer) + TURNING * raw / 2 / memory,
        select=select,
        compute=compute,
    )


class Bandwidths(NamedTuple):
    """What a tier has to read, 10^9 bytes a second by its published rate.

    ``even``: fusion is as late as full prefill; infinite where it is later however fast the tier.
    ``half``: reading is half of fusion's time; below, the tier is the bottleneck.
    """

    even: float
    half: float


def needed_bandwidths(nbytes: float, times: Times, efficiency: Efficiency) -> Bandwidths:
    """For this number of stored bytes, from the times without reading."""
    saved = times.prefill - times.behind_tier
    per_s = nbytes / (efficiency.transfer * GIGA)
    return Bandwidths(per_s / saved if saved > 0 else inf, per_s / times.behind_tier)


def tables(contexts: Sequence[int], ratio: float, efficiency: Efficiency | None = None) -> str:
    """Markdown: where the time goes, what codec each tier calls for, what bandwidth is needed."""
    how = efficiency or Efficiency()
    goes, calls, needs, n_evicted = [], [], [], []
    for name, shape, machine, context in (
        (*model, machine, context)
        for model in MODELS.items()
        for machine in MACHINES
        for context in contexts
    ):
        case = [name, machine.name, f"{context:,}"]
        if not fits(shape, machine, context):
            n_evicted.append(", ".join(case))
            continue
        settings: dict[str, Any] = {"context": context, "ratio": ratio, "efficiency": how}
        raw = simulate(shape, machine, tier_gb_s=NVME.gb_s, **settings)
        steps = (raw.prefill, raw.read, raw.copy, raw.select, raw.compute, raw.fusion)
        milliseconds = [f"{1000 * step:,.0f}" for step in steps]
        goes.append([*case, *milliseconds, f"{raw.speedup:.1f}x", raw.slowest])
        best = []
        for tier in TIERS:
            by = {
                codec: simulate(
                    shape, machine, codec=codec, tier_gb_s=tier.gb_s, **settings
                ).speedup
                for codec in CODECS
            }
            codec = max(by, key=by.__getitem__)
            best.append(f"{codec}, {by[codec]:.1f}x")
        calls.append([*case, *best])
        line = [*case, f"{stored_bytes(shape, context, DEFAULT_CODEC) / GIGA:.2f}"]
        for codec in TABLED:
            times = simulate(shape, machine, codec=codec, **settings)
            needed = needed_bandwidths(stored_bytes(shape, context, codec), times, how)
            line += ["never" if each == inf else f"{each:.1f}" for each in needed]
        needs.append(line)
    place = ["model", "machine", "context"]
    costs = ["full prefill", "read", "copy, turn", "select", "compute", "fusion"]
    bounds = [f"{codec} {bound}" for codec in TABLED for bound in Bandwidths._fields]
    sources = "; ".join(f"{each.name}: {each.source}" for each in (*MACHINES, *TIERS))
    parts = [
        f"**Simulated, not measured**: bf16, ratio {ratio:g}, {CHUNK_TOKENS}-token chunks. {how}.",
        f"Left out, because it does not fit: {'; '.join(n_evicted) or 'nothing'}.",
        f"Sources: {sources}.",
        f"Simulated milliseconds, raw chunks from {NVME.name}:",
        _table([*place, *costs, "speedup", "slowest step"], goes),
        "Simulated: the fastest codec from a tier, and its speedup over full prefill:",
        _table([*place, *(tier.name for tier in TIERS)], calls),
        "Simulated: GB/s that a tier has to have. *even*: fusion is as late as full prefill; "
        "*half*: reading is half of fusion's time:",
        _table([*place, "GB raw", *bounds], needs),
    ]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="4096,32768", help="tokens of retrieved text")
    parser.add_argument("--ratio", type=float, default=0.15, help="recomputed, 0 to 1")
    options = parser.parse_args(arguments)
    print(tables([int(each) for each in options.contexts.split(",")], options.ratio))


if __name__ == "__main__":
    main()
