"""The loops by themselves: how far off, how long, and how near to what the device can do."""

from __future__ import annotations

import torch

from a3_engine.fusion.cache import FusedLayer
from a3_engine.fusion.correction import Corrector, KVCorrection
from a3_engine.kv import ChunkKV
from a3_engine.layout import Layout, Span
from a3_engine.model.attention import attend_ragged, attend_rows
from a3_engine.model.masks import DecodeMask, RowMask
from a3_engine.model.rotary import Rotation
from a3_engine.native import kernels_on

from .common import DEVICE, Bench, on_device

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16


class Layer:
    layer_idx = 0


def _states(heads: int, n: int) -> torch.Tensor:
    return torch.randn(1, heads, n + 64, HEAD_DIM, device=DEVICE, dtype=DTYPE)[:, :, :n]


def attention(bench: Bench) -> None:
    """Scattered rows over a prompt's keys, against fp64."""
    shapes = ((24, 64),) if bench.tiny else ((678, 4160), (40, 4160), (1292, 8256), (1600, 32_768))
    for rows, keys in shapes:
        at = torch.randperm(keys - 1)[: rows - 1].sort().values.to(DEVICE)
        at = torch.cat([at, torch.tensor([keys - 1], device=DEVICE)])
        query, key, value = _states(HEADS, rows), _states(KV_HEADS, keys), _states(KV_HEADS, keys)
        seen = RowMask(at)

        def ours(query=query, key=key, value=value, seen=seen):
            return attend_rows(Layer(), query, key, value, seen, scaling=HEAD_DIM**-0.5)

        found = {"us": on_device(ours)}
        products = 4 * HEADS * HEAD_DIM * float((at + 1).sum())
        found["tflops"] = products / found["us"] / 1e6
        wide = [x[0].double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, value)]
        part = slice(0, 64)
        scores = (query[0, :, part].double() @ wide[0].transpose(1, 2)) * HEAD_DIM**-0.5
        hidden = torch.arange(keys, device=DEVICE) > at[part, None]
        exact = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ wide[1]
        got = ours()[0, part].transpose(0, 1).double()
        found["error"] = float((got - exact).norm() / exact.norm())
        bench.say("attention", rows=rows, keys=keys, **found)


def tiles(bench: Bench) -> None:
    """Other sizes of a tile than those that `attend` takes."""
    kernels = kernels_on(DEVICE)
    if kernels is None or bench.tiny:
        return
    chosen = kernels.attention._tile
    try:
        for rows, keys in ((678, 4160), (40, 4160), (1600, 32_768)):
            at = torch.randperm(keys)[:rows].sort().values.to(DEVICE)
            query, key, value = (
                _states(HEADS, rows),
                _states(KV_HEADS, keys),
                _states(KV_HEADS, keys),
            )
            seen, found = RowMask(at), {}
            for tile in (
                (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2),
                (128, 64, 8, 4), (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4),
            ):  # fmt: skip
                kernels.attention._tile = lambda *_, tile=tile: tile
                try:
                    found["x".join(map(str, tile))] = on_device(
                        lambda q=query, k=key, v=value, s=seen: attend_rows(
                            Layer(), q, k, v, s, scaling=HEAD_DIM**-0.5
                        )
                    )
                except Exception as error:
                    found["x".join(map(str, tile))] = type(error).__name__
            bench.say("tiles us", rows=rows, keys=keys, **found)
    finally:
        kernels.attention._tile = chosen


def one_token(bench: Bench) -> None:
    """A decoding step's attention, of one and of eight requests."""
    keys = 64 if bench.tiny else 4160
    for requests in (1, 8):
        query = torch.randn(requests, HEADS, 1, HEAD_DIM, device=DEVICE, dtype=DTYPE)
        caches = [_states(KV_HEADS, keys + 10 * r) for r in range(requests)]
        took = on_device(
            lambda q=query, c=caches: attend_ragged(q, c, c, DecodeMask(), scaling=HEAD_DIM**-0.5)
        )
        nbytes = 2 * sum(c.numel() * 2 for c in caches)
        bench.say("one token", requests=requests, us=took, GB_s=nbytes / took / 1e3)


def placing_and_repair(bench: Bench) -> None:
    """Both move bytes and little else."""
    kernels = kernels_on(DEVICE)
    if kernels is None:
        return
    layers, n_chunks, length = (2, 2, 32) if bench.tiny else (32, 8, 512)
    chunks = [
        (
            at * length,
            ChunkKV(
                *torch.randn(2, layers, KV_HEADS, length, HEAD_DIM, device=DEVICE, dtype=DTYPE)
            ),
        )
        for at in range(n_chunks)
    ]
    tokens = n_chunks * length
    cache = [(_states(KV_HEADS, tokens), _states(KV_HEADS, tokens)) for _ in range(layers)]
    rotation = Rotation(torch.rand(layers, HEAD_DIM // 2))
    tables = rotation.tables_up_to(tokens, [DEVICE] * layers)
    place = kernels.placer(chunks, cache, tables)
    took = on_device(lambda: place(slice(None)))
    nbytes = 2 * sum(kv.nbytes for _, kv in chunks)
    bench.say("placing", us=took, GB_s=nbytes / took / 1e3)

    fresh = torch.arange(tokens - 20, tokens)
    layout = Layout(tokens, (Span(0, tokens - 20),), 0, fresh, fresh).on(DEVICE)
    rows = torch.arange(0, tokens, 7, device=DEVICE)
    drift = Corrector(KVCorrection(), layout, rotation, [DEVICE] * layers)
    layer = FusedLayer(*(x.contiguous() for x in cache[0]), tokens)
    key, value = _states(KV_HEADS, len(rows)), _states(KV_HEADS, len(rows))
    bench.say("repair", us=on_device(lambda: drift.apply(0, layer, rows, key, value)))
