"""Keys and values into a cache: whole chunks, turned on the way, and one token of each request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from a3_engine.devices import send
from a3_engine.kv import ChunkKV
from a3_engine.native.kernels.launching import compiled, on

Chunks = Sequence[tuple[int, ChunkKV]]
Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]

PLACED_TOKENS = 32  # that one program copies and turns
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _append(
    new_keys, new_values, table, grown, seq_step, head_step, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """One head of one request's newest token."""
    seq, head = tl.program_id(0), tl.program_id(1)
    dtype = new_keys.dtype.element_ty
    keys = tl.load(table + seq * 4).to(tl.pointer_type(dtype))
    values = tl.load(table + seq * 4 + 1).to(tl.pointer_type(dtype))
    at = tl.load(table + seq * 4 + 3) + tl.load(grown + seq)
    into = head * tl.load(table + seq * 4 + 2) + at * D
    d = tl.arange(0, DP)
    source = seq.to(tl.int64) * seq_step + head * head_step + d
    tl.store(keys + into + d, tl.load(new_keys + source, mask=d < D), mask=d < D)
    tl.store(values + into + d, tl.load(new_values + source, mask=d < D), mask=d < D)


def append(
    keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, grown: torch.Tensor
) -> None:
    """Write the newest key and value of each request, ``(requests, kv_heads, 1, head_dim)``.

    Where to is said by a table as in :func:`attend`, whose last column, with ``grown``, counts the
    tokens that are there.
    """
    keys, values = keys.contiguous(), values.contiguous()
    requests, kv_heads, _, head_dim = keys.shape
    with on(keys.device):
        _append[requests, kv_heads](
            keys, values, table, grown, keys.stride(0), keys.stride(1),
            D=head_dim, DP=triton.next_power_of_2(head_dim), num_warps=1,
        )  # fmt: skip


@compiled
def _place(
    info, layers, tables, first_layer, kv_heads, dst_head, dst_prompt,
    HALF: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head of one layer: copied, and the keys turned."""
    block, layer = tl.program_id(0), first_layer + tl.program_id(1) // kv_heads
    head, prompt = tl.program_id(1) % kv_heads, tl.program_id(2)
    # Of a block: addresses of the chunk's keys and values, the chunk's length, the block's place
    # in it and in the prompt.
    info += block * 5
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    src_keys = tl.load(info).to(pointer)
    src_values = tl.load(info + 1).to(pointer)
    length, inside, start = tl.load(info + 2), tl.load(info + 3), tl.load(info + 4)
    dst_keys = tl.load(layers + layer * 2).to(pointer)
    dst_values = tl.load(layers + layer * 2 + 1).to(pointer)
    cosines = tl.load(tables + layer * 2).to(tl.pointer_type(tl.float32))
    sines = tl.load(tables + layer * 2 + 1).to(tl.pointer_type(tl.float32))
    t = tl.arange(0, T)
    ok = inside + t < length
    source = ((layer.to(tl.int64) * kv_heads + head) * length + inside + t) * D
    target = prompt.to(tl.int64) * dst_prompt + head * dst_head + (start + t).to(tl.int64) * D
    d = tl.arange(0, DP)
    every = ok[:, None] & (d < D)[None, :]
    v = tl.load(src_values + source[:, None] + d[None, :], mask=every)
    tl.store(dst_values + target[:, None] + d[None, :], v, mask=every)
    h = tl.arange(0, HP)
    turned = ok[:, None] & (h < HALF)[None, :]
    angle = (start + t)[:, None] * HALF + h[None, :]
    cos = tl.load(cosines + angle, mask=turned, other=0.0)
    sin = tl.load(sines + angle, mask=turned, other=0.0)
    one = tl.load(src_keys + source[:, None] + h[None, :], mask=turned, other=0.0).to(tl.float32)
    two = tl.load(src_keys + source[:, None] + HALF + h[None, :], mask=turned, other=0.0).to(
        tl.float32
    )
    tl.store(
        dst_keys + target[:, None] + h[None, :], (one * cos - two * sin).to(DTYPE), mask=turned
    )
    tl.store(
        dst_keys + target[:, None] + HALF + h[None, :],
        (two * cos + one * sin).to(DTYPE),
        mask=turned,
    )
    rest = every & (d >= 2 * HALF)[None, :]
    k = tl.load(src_keys + source[:, None] + d[None, :], mask=rest)
    tl.store(dst_keys + target[:, None] + d[None, :], k, mask=rest)


def placer(
    chunks: Chunks, layers: Layers, tables: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Callable[[slice], None]:
    """What copies chunks into some layers of a cache and turns their keys, in fp32, on the way.

    Parameters
    ----------
    chunks : sequence of (position of the first token, ChunkKV)
        On the device of the layers.
    layers : sequence of (keys, values)
        The cache, ``(prompts, kv_heads, tokens, head_dim)``, all of one shape on one device.
    tables : sequence of (cos, sin)
        As in :func:`a3_engine.native.loops.place`.
    """
    keys = layers[0][0]
    n_layers, kv_heads, _, head_dim = chunks[0][1].keys.shape
    device, half = keys.device, tables[0][0].shape[1]
    blocks = [
        number
        for start, kv in chunks
        for at in range(0, kv.n_tokens, PLACED_TOKENS)
        for number in (kv.keys.data_ptr(), kv.values.data_ptr(), kv.n_tokens, at, start + at)
    ]
    pointers = [one.data_ptr() for pairs in (layers, tables) for pair in pairs for one in pair]
    # The blocks come last, since Triton would compile anew for another alignment of the others.
    sent = send(torch.tensor(pointers + blocks), device)
    to, turns, info = torch.split(sent, [2 * n_layers, 2 * n_layers, len(blocks)])

    def place(some: slice, alive: object = (chunks, layers, tables)) -> None:
        # By addresses alone nobody would keep alive what they point to.
        first, stop, _ = some.indices(n_layers)
        with on(device):
            _place[len(blocks) // 5, (stop - first) * kv_heads, keys.shape[0]](
                info, to, turns, first, kv_heads, keys.stride(1), keys.stride(0),
                HALF=half, DTYPE=_TRITON[keys.dtype], D=head_dim, T=PLACED_TOKENS,
                HP=triton.next_power_of_2(half), DP=triton.next_power_of_2(head_dim), num_warps=4,
            )  # fmt: skip

    return place
