"""Attention of scattered rows: tiles of a row block's queries over tiles of its keys.

The tiled softmax is that of FlashAttention (arXiv 2205.14135), and the cut of long key ranges that
of Flash-Decoding; the table of addresses is as in Triton's tutorial on grouped products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from a3_engine.devices import send
from a3_engine.native.kernels.launching import LOG2_E, compiled, on, processors

LEAST_KEYS, MOST_PARTS = 256, 64  # of a part and of a row, where the keys of few rows are cut


@triton.jit
def _scored(
    q, keys, values, which, ok, seen, acc, total, top, scale, cap, kv_row, d,
    D: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: its scores, and what they add to the sums."""
    inside = ok[:, None] & (d < D)[None, :]
    at = which[:, None].to(tl.int64) * kv_row + d[None, :]
    k = tl.load(keys + at, mask=inside, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:  # tanh by an exponential; the scale has no log2(e) in it then
        s = cap * (1.0 - 2.0 / (tl.exp(2.0 * s / cap) + 1.0)) * 1.4426950408889634
    if MASKED:
        s = tl.where(seen & ok[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    v = tl.load(values + at, mask=inside, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(p, 1), new


@compiled
def _attend(
    query, keys, values, table, firsts, lasts, shared, counts, sinks, output, sums, totals, tops,
    rows, heads, n_parts, scale, cap,
    q_seq, q_head, q_row, kv_head, kv_row, seen_seq,
    TABLED: tl.constexpr, SHARED: tl.constexpr, SINKS: tl.constexpr,
    CAPPED: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A block of rows of the heads that share keys, over a part of the keys."""
    R: tl.constexpr = M // G
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys begin
    kv, seq, part = tl.program_id(1), tl.program_id(2) // n_parts, tl.program_id(2) % n_parts
    if TABLED:
        dtype = query.dtype.element_ty
        keys = tl.load(table + seq * 4).to(tl.pointer_type(dtype))
        values = tl.load(table + seq * 4 + 1).to(tl.pointer_type(dtype))
        # What torch allocates is aligned, and so are whole heads of keys; the compiler cannot know.
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        kv_head = tl.multiple_of(tl.load(table + seq * 4 + 2), 16)
    keys += kv.to(tl.int64) * kv_head
    values += kv.to(tl.int64) * kv_head
    m = tl.arange(0, M)
    row, head = block * R + m // G, kv * G + m % G
    real = (m < R * G) & (row < rows)
    d = tl.arange(0, DP)
    q = tl.load(
        query
        + seq.to(tl.int64) * q_seq
        + head[:, None] * q_head
        + row[:, None] * q_row
        + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    first = tl.load(firsts + seq * seen_seq + row, mask=real, other=2147483647).to(tl.int32)
    last = tl.load(lasts + seq * seen_seq + row, mask=real, other=0).to(tl.int32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if SINKS:  # noqa: SIM102 - as for SHARED below
        # A score that takes its share and gives nothing is counted once.
        if part == 0:
            score = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
            top, total = score * 1.4426950408889634, total + 1.0
    acc = tl.zeros([M, DP], tl.float32)
    n = tl.arange(0, N)
    if SHARED:  # noqa: SIM102 - it is known when this is compiled, and the part is not
        # Keys that all see, where they stand before the row's own range.
        if part == 0:
            count = tl.load(counts + seq * seen_seq + row, mask=real, other=0).to(tl.int32)
            most = tl.max(count)
            for at in range(0, most, N):
                place = at + n
                which = tl.load(shared + place, mask=place < most, other=0).to(tl.int32)
                acc, total, top = _scored(
                    q, keys, values, which, place < most, place[None, :] < count[:, None],
                    acc, total, top, scale, cap, kv_row, d, D, True, CAPPED, PRECISION,
                )  # fmt: skip
    # From the first key that any row sees to the last; in the middle, those that all of them see.
    low, high = tl.min(first), tl.max(last)
    all_from = tl.max(tl.where(real, first, 0))
    all_to = tl.min(tl.where(real, last, 2147483647))
    span = tl.cdiv(tl.cdiv(high - low, N), n_parts) * N
    begin = low + part * span
    end = tl.minimum(begin + span, high)
    plain_from = low + tl.cdiv(all_from - low, N) * N
    plain_to = low + (tl.maximum(all_to - low, 0) // N) * N
    for at in range(begin, tl.minimum(end, plain_from), N):
        where = at + n
        seen = (where[None, :] >= first[:, None]) & (where[None, :] < last[:, None])
        acc, total, top = _scored(
            q, keys, values, where, where < high, seen, acc, total, top, scale, cap, kv_row, d,
            D, True, CAPPED, PRECISION,
        )  # fmt: skip
    for at in range(tl.maximum(begin, plain_from), tl.minimum(end, plain_to), N):
        where = at + n
        acc, total, top = _scored(
            q, keys, values, where, where < high, where[None, :] < high, acc, total, top, scale,
            cap, kv_row, d, D, False, CAPPED, PRECISION,
        )  # fmt: skip
    for at in range(tl.maximum(begin, tl.maximum(plain_from, plain_to)), end, N):
        where = at + n
        seen = (where[None, :] >= first[:, None]) & (where[None, :] < last[:, None])
        acc, total, top = _scored(
            q, keys, values, where, where < high, seen, acc, total, top, scale, cap, kv_row, d,
            D, True, CAPPED, PRECISION,
        )  # fmt: skip
    stored = real[:, None] & (d < D)[None, :]
    if SPLIT:
        at = ((seq * n_parts + part) * rows + row).to(tl.int64) * heads + head
        tl.store(sums + at[:, None] * D + d[None, :], acc, mask=stored)
        tl.store(totals + at, total, mask=real)
        tl.store(tops + at, top, mask=real)
    else:
        at = (seq * rows + row).to(tl.int64) * heads + head
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(output + at[:, None] * D + d[None, :], acc.to(q.dtype), mask=stored)


@compiled
def _join(
    output, sums, totals, tops, outputs, n_parts,
    D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of one row of one head, together; ``outputs`` is rows times heads."""
    at = tl.program_id(0).to(tl.int64)
    seq, rest = at // outputs, at % outputs
    part, d = tl.arange(0, PARTS), tl.arange(0, DP)
    ok = part < n_parts
    where = (seq * n_parts + part) * outputs + rest
    top = tl.load(tops + where, mask=ok, other=float("-inf"))
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(totals + where, mask=ok, other=0.0) * share, 0)
    acc = tl.load(
        sums + where[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
    )
    joined = tl.sum(acc * share[:, None], 0) / total
    tl.store(output + at * D + d, joined.to(output.dtype.element_ty), mask=d < D)


def _tile(group: int, rows: int, head_dim: int, width: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages, for heads of a size in bytes of a value."""
    bytes_a_row = triton.next_power_of_2(head_dim) * width
    most = 128 if bytes_a_row <= 256 else 64 if bytes_a_row <= 512 else 32
    # Few sizes, since each is compiled.
    m = next((size for size in (16, 64) if group * rows <= size), 128)
    m = max(min(m, most), triton.next_power_of_2(group))
    n = 64 if bytes_a_row <= 512 else 32
    return m, n, 8 if m >= 128 else 4, 3 if bytes_a_row <= 256 else 2


def attend(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    first: torch.Tensor,
    last: torch.Tensor,
    scaling: float,
    shared: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the rows of several sequences; see :func:`a3_engine.native.loops.attend`.

    Indices lie on the device, and ``shared`` may end in ones beyond all keys, which nobody sees.

    Parameters
    ----------
    softcap : float or None
        Scores are bent to stay below it (Gemma 2).
    sinks : torch.Tensor or None
        A score of each head, whose weight goes nowhere; ``(heads,)``.
    table : torch.Tensor or None
        int64, ``(sequences, 4)``: the addresses of each sequence's keys and values, the step from
        head to head, and a number that is not looked at, where they are known by now. ``keys``
        then only say how many heads there are, and how long the longest may be.
    """
    sequences, heads, rows, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    output = query.new_empty(sequences, rows, heads, head_dim)
    m, n, warps, stages = _tile(group, rows, head_dim, query.element_size())
    programs = triton.cdiv(rows, m // group) * kv_heads * sequences
    most = max(1, max(key.shape[2] for key in keys) // LEAST_KEYS)
    parts = 1
    if programs < processors(query.device):
        parts = min(most, triton.cdiv(2 * processors(query.device), programs), MOST_PARTS)
    counts = first
    if shared is not None:
        counts = torch.searchsorted(shared, first)
    if table is None and sequences > 1:
        table = send(addresses(keys, values), query.device)
    sums = totals = tops = output
    if parts > 1:
        sums, totals, tops = (
            torch.empty(
                sequences * parts * rows * heads * size, dtype=torch.float32, device=query.device
            )
            for size in (head_dim, 1, 1)
        )
    padded = max(16, triton.next_power_of_2(head_dim))  # which products want at least
    # A scale in powers of 2, but where scores are bent first.
    scale = scaling if softcap is not None else scaling * LOG2_E
    with on(query.device):
        _attend[triton.cdiv(rows, m // group), kv_heads, sequences * parts](
            query, keys[0], values[0], first if table is None else table, first, last,
            first if shared is None else shared, counts, query if sinks is None else sinks,
            output, sums, totals, tops,
            rows, heads, parts, scale, softcap or 1.0,
            query.stride(0), query.stride(1), query.stride(2),
            keys[0].stride(1), head_dim, rows if first.shape[0] > 1 else 0,
            TABLED=table is not None, SHARED=shared is not None, SINKS=sinks is not None,
            CAPPED=softcap is not None,
            SPLIT=parts > 1, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            G=group, M=m, N=n, D=head_dim, DP=padded, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            _join[(sequences * rows * heads,)](
                output, sums, totals, tops, rows * heads, parts,
                D=head_dim, DP=padded, PARTS=MOST_PARTS,
            )  # fmt: skip
    return output


def addresses(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ``table`` of :func:`attend` for these sequences, on the CPU."""
    return torch.tensor(
        [[k.data_ptr(), v.data_ptr(), k.stride(1), 0] for k, v in zip(keys, values, strict=True)]
    )
