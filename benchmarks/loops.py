"""The loops in C++ beside torch's operations, a layer at a time, and a request with and without.

`python benchmarks/loops.py [float32]` prints the tables of docs/performance.md, "Loops in C++", in
bf16 unless told otherwise, in a minute or two during which nothing else may run. It needs a machine
on which the loops are compiled.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch

from a3_engine import A3Engine
from a3_engine.benchmark.prompts import QUESTION, chunk_texts
from a3_engine.fusion.cache import FusedLayer
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.layout import Layout, Span
from a3_engine.model.attention import attend_ragged, attend_rows
from a3_engine.model.masks import DecodeMask, RowMask
from a3_engine.model.rotary import Rotation
from a3_engine.native import loops as native

HEADS, KV_HEADS, HEAD_DIM, SCALING = 9, 3, 64, 0.125  # the demo model's
LAYERS = 6  # caches in turn, so that one token's do not stay in the processor
ROUNDS = 9
DTYPE: torch.dtype = getattr(torch, sys.argv[1] if sys.argv[1:] else "bfloat16")
compiled = native.library


class Layer:
    layer_idx = 0


def use(loops: bool) -> None:
    """From now on compute by the loops, or by torch."""
    native.library = compiled if loops else lambda dtype: None


def both(call: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds by torch and by the loops, in turns."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(ROUNDS + 1):
        for loops in taken:
            use(loops)
            started = time.perf_counter()
            call()
            if turn:
                taken[loops].append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[False]), statistics.median(taken[True])


def states(n_tokens: int) -> torch.Tensor:
    return torch.randn(1, KV_HEADS, n_tokens + 256, HEAD_DIM).to(DTYPE)[:, :, :n_tokens]


def rows_over(positions: torch.Tensor, n_keys: int) -> str:
    query = torch.randn(1, len(positions), HEADS, HEAD_DIM).to(DTYPE).transpose(1, 2)
    key, value, rows = states(n_keys), states(n_keys), RowMask(positions)

    def attend() -> torch.Tensor:
        return attend_rows(Layer(), query, key, value, rows, scaling=SCALING)

    group = HEADS // KV_HEADS
    wide = [each.double().repeat_interleave(group, 1) for each in (key, value)]
    scores = query.double() @ wide[0].transpose(2, 3) * SCALING
    scores.masked_fill_(torch.arange(n_keys) > positions[:, None], float("-inf"))
    exact = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    errors = []
    for loops in (False, True):
        use(loops)
        errors.append(float((attend().double() - exact).norm() / exact.norm()))
    torch_ms, loops_ms = both(attend)
    return f"{torch_ms:.1f} ms | {loops_ms:.1f} ms | {errors[0]:.2g}, {errors[1]:.2g}"


def one_token(requests: int, n_keys: int) -> str:
    query = torch.randn(requests, HEADS, 1, HEAD_DIM).to(DTYPE)
    caches = [[[states(n_keys) for _ in range(requests)] for _ in "kv"] for _ in range(LAYERS)]
    ragged = DecodeMask()

    def attend() -> None:
        for keys, values in caches:
            attend_ragged(query, keys, values, ragged, scaling=SCALING)

    torch_ms, loops_ms = both(attend)
    return f"{torch_ms / LAYERS:.2f} ms | {loops_ms / LAYERS:.2f} ms | "


def drift_repair(rows: torch.Tensor, n_chunk: int) -> str:
    """All chunk tokens of a layer follow the rows; errors are those of their moves."""
    fresh = torch.tensor([n_chunk])
    layout = Layout(n_chunk + 1, (Span(0, n_chunk),), 0, fresh, fresh)
    rotation = Rotation(10_000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))[None])
    drift = Corrector(KVCorrection(), layout, rotation, [torch.device("cpu")])
    stored = [states(n_chunk + 1) for _ in "kv"]
    fresh_states = [torch.randn(1, KV_HEADS, len(rows), HEAD_DIM).to(DTYPE) for _ in "kv"]

    def moved(dtype: torch.dtype) -> list[torch.Tensor]:
        layer = FusedLayer(*(each.to(dtype, copy=True) for each in stored), n_chunk + 1)
        drift.apply(0, layer, rows, *(each.to(dtype) for each in fresh_states))
        return [
            (after.double() - before.double())
            for after, before in zip(layer.stored(), stored, strict=True)
        ]

    use(False)
    exact = torch.cat(moved(torch.double))
    errors = []
    for loops in (False, True):
        use(loops)
        errors.append(float((torch.cat(moved(DTYPE)) - exact).norm() / exact.norm()))
    layer = FusedLayer(*(each.clone() for each in stored), n_chunk + 1)
    torch_ms, loops_ms = both(lambda: drift.apply(0, layer, rows, *fresh_states))
    return f"{torch_ms:.1f} ms | {loops_ms:.1f} ms | {errors[0]:.2g}, {errors[1]:.2g}"


def requests() -> None:
    """Whole requests of 4,096 tokens: milliseconds, and tokens a second after the first."""
    with TemporaryDirectory() as folder:
        engine = A3Engine.from_pretrained("smollm2-135m-instruct", cache_dir=folder, dtype=DTYPE)
        chunks = chunk_texts(engine.runtime.planner, 4096, 512)
        engine.precompute(chunks, progress=False)
        print("| method | TTFT by torch, ms | load | tokens/s | by loops, ms | load | tokens/s |")
        for selector, ratio in (("full_reuse", 0.0), ("mend", 0.05), ("mend", 0.15)):
            found: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
            for turn in range(6):
                for loops in found:
                    use(loops)
                    engine.runtime.prefix_cache.clear()
                    report = engine.generate(
                        QUESTION, chunks=chunks, selector=selector, ratio=ratio, max_new_tokens=9
                    ).report
                    decoded = (report.generated_tokens - 1) / report.decode_s
                    if turn:
                        found[loops].append((1e3 * report.ttft_s, 1e3 * report.load_s, decoded))
            cells = [
                f"{statistics.median(values):.0f}"
                for loops in found
                for values in zip(*found[loops], strict=True)
            ]
            print(f"| {selector} @ {ratio:g} | " + " | ".join(cells) + " |")
        engine.close()


@torch.inference_mode()
def main() -> None:
    if compiled(DTYPE) is None:
        raise SystemExit("The loops cannot be had here: docs/performance.md says where they can.")
    torch.manual_seed(0)
    late = (4143 - (torch.rand(1400).square() * 4144).long().unique()[:611]).sort().values
    later = (7999 - (torch.rand(2800).square() * 8000).long().unique()[:1222]).sort().values
    evenly = torch.randperm(4144)[:611].sort().values
    print(f"| one layer, {DTYPE} | torch's operations | loops | relative errors |")
    print(f"| {len(late)} rows over 4,144 keys, standing late | {rows_over(late, 4144)} |")
    print(f"| {len(evenly)} rows, standing evenly | {rows_over(evenly, 4144)} |")
    print(f"| {len(later)} rows over 8,000 keys, standing late | {rows_over(later, 8000)} |")
    print(f"| 35 rows over 4,144 keys | {rows_over(late[-35:], 4144)} |")
    print(f"| 512 rows of a chunk alone | {rows_over(torch.arange(512), 512)} |")
    print(f"| KV correction of 4,144 tokens by 64 of 611 rows | {drift_repair(evenly, 4144)} |")
    for n_requests in (8, 1):
        cells = one_token(n_requests, 4144)
        print(f"| one token of {n_requests} requests over 4,144 keys each | {cells} |")
    requests()


if __name__ == "__main__":
    main()
