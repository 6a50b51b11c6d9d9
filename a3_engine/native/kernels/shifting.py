"""KV correction: how far the probes moved, and the others after them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from a3_engine.native.kernels.launching import LOG2_E, compiled, on

SHIFTED_TOKENS = 64  # that one program moves


@compiled
def _moves(
    keys, values, new_keys, new_values, rows, which, cosines, sines,
    probes, key_moves, value_moves,
    kv_head, new_head, kv_heads, n_probes,
    HALF: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """One probe: its stored values at length 1, and how far its keys and values moved."""
    probe = tl.program_id(0)
    among = tl.load(which + probe)
    at = tl.load(rows + among)
    head, d = tl.arange(0, H), tl.arange(0, DP)
    ok = (head < kv_heads)[:, None] & (d < D)[None, :]
    old_at = head[:, None].to(tl.int64) * kv_head + at * D
    new_at = head[:, None].to(tl.int64) * new_head + among * D
    into = (head[:, None] * n_probes + probe) * D
    old = tl.load(values + old_at + d[None, :], mask=ok, other=0.0).to(tl.float32)
    new = tl.load(new_values + new_at + d[None, :], mask=ok, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(tl.sum(old * old, 1), 0))
    dtype = probes.dtype.element_ty
    tl.store(probes + into + d[None, :], (old / tl.maximum(length, 1e-12)).to(dtype), mask=ok)
    tl.store(value_moves + into + d[None, :], (new - old).to(dtype), mask=ok)
    h = tl.arange(0, HP)
    turned = (head < kv_heads)[:, None] & (h < HALF)[None, :]
    cos = tl.load(cosines + at * HALF + h, mask=h < HALF, other=0.0)[None, :]
    sin = tl.load(sines + at * HALF + h, mask=h < HALF, other=0.0)[None, :]
    one = tl.load(new_keys + new_at + h[None, :], mask=turned, other=0.0).to(tl.float32)
    one -= tl.load(keys + old_at + h[None, :], mask=turned, other=0.0).to(tl.float32)
    two = tl.load(new_keys + new_at + HALF + h[None, :], mask=turned, other=0.0).to(tl.float32)
    two -= tl.load(keys + old_at + HALF + h[None, :], mask=turned, other=0.0).to(tl.float32)
    tl.store(key_moves + into + h[None, :], (one * cos + two * sin).to(dtype), mask=turned)
    tl.store(key_moves + into + HALF + h[None, :], (two * cos - one * sin).to(dtype), mask=turned)
    rest = ok & (d >= 2 * HALF)[None, :]
    moved = tl.load(new_keys + new_at + d[None, :], mask=rest, other=0.0).to(tl.float32)
    moved -= tl.load(keys + old_at + d[None, :], mask=rest, other=0.0).to(tl.float32)
    tl.store(key_moves + into + d[None, :], moved.to(dtype), mask=rest)


@compiled
def _shift(
    keys, values, share, probes, key_moves, value_moves, count, cosines, sines,
    tokens, start, kv_head, kv_heads, n_probes, sharpness,
    HALF: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Some tokens of all heads: likeness to the probes, then the mean move."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    p, d, h = tl.arange(0, P), tl.arange(0, DP), tl.arange(0, HP)
    ok = t < tokens
    known = p < tl.load(count)
    states = ok[:, None] & (d < D)[None, :]
    ours = (p < n_probes)[:, None] & (d < D)[None, :]
    of_token = (start + t)[:, None].to(tl.int64) * D
    alike, squares = tl.zeros([T, P], tl.float32), tl.zeros([T], tl.float32)
    for head in range(kv_heads):
        v = tl.load(values + head * kv_head + of_token + d[None, :], mask=states, other=0.0)
        probe = tl.load(
            probes + (head * n_probes + p)[:, None] * D + d[None, :], mask=ours, other=0.0
        )
        alike += tl.dot(v, tl.trans(probe), input_precision=PRECISION)
        squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
    alike = alike / tl.maximum(tl.sqrt(squares), 1e-12)[:, None] * sharpness
    alike = tl.where(known[None, :], alike, float("-inf"))
    top = tl.max(alike, 1)
    weights = tl.exp2(alike - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    follows = tl.load(share + t, mask=ok, other=0.0) / tl.where(total == 0.0, 1.0, total)
    dtype = values.dtype.element_ty
    weights = (weights * follows[:, None]).to(dtype)
    angle = (start + t)[:, None] * HALF + h[None, :]
    turned = ok[:, None] & (h < HALF)[None, :]
    cos = tl.load(cosines + angle, mask=turned, other=0.0)
    sin = tl.load(sines + angle, mask=turned, other=0.0)
    for head in range(kv_heads):
        at = head * kv_head + of_token
        move_at = (head * n_probes + p)[:, None] * D
        move = tl.load(value_moves + move_at + d[None, :], mask=ours, other=0.0)
        v = tl.load(values + at + d[None, :], mask=states, other=0.0).to(tl.float32)
        v += tl.dot(weights, move, input_precision=PRECISION)
        tl.store(values + at + d[None, :], v.to(dtype), mask=states)
        first = (p < n_probes)[:, None] & (h < HALF)[None, :]
        one = tl.load(key_moves + move_at + h[None, :], mask=first, other=0.0)
        two = tl.load(key_moves + move_at + HALF + h[None, :], mask=first, other=0.0)
        one = tl.dot(weights, one, input_precision=PRECISION)
        two = tl.dot(weights, two, input_precision=PRECISION)
        k = tl.load(keys + at + h[None, :], mask=turned, other=0.0).to(tl.float32)
        tl.store(keys + at + h[None, :], (k + one * cos - two * sin).to(dtype), mask=turned)
        k = tl.load(keys + at + HALF + h[None, :], mask=turned, other=0.0).to(tl.float32)
        tl.store(keys + at + HALF + h[None, :], (k + two * cos + one * sin).to(dtype), mask=turned)
        if 2 * HALF < D:  # what partial rotation leaves as it is
            rest = states & (d >= 2 * HALF)[None, :]
            left = ours & (d >= 2 * HALF)[None, :]
            move = tl.load(key_moves + move_at + d[None, :], mask=left, other=0.0)
            k = tl.load(keys + at + d[None, :], mask=rest, other=0.0).to(tl.float32)
            k += tl.dot(weights, move, input_precision=PRECISION)
            tl.store(keys + at + d[None, :], k.to(dtype), mask=rest)


def shift(
    keys: torch.Tensor,
    values: torch.Tensor,
    span: slice,
    share: torch.Tensor,
    rows: torch.Tensor,
    probes: torch.Tensor,
    count: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor],
    table: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> None:
    """Move keys and values, in place, by the mean move of the probes that are like them.

    Parameters
    ----------
    keys, values : torch.Tensor
        A layer's, ``(kv_heads, tokens, head_dim)``, a head's tokens side by side.
    span : slice
        The tokens that may move.
    share : torch.Tensor
        Of the mean move that each of them follows; fp32.
    rows : torch.Tensor
        Positions of the computed rows.
    probes : torch.Tensor
        Which of the rows show the way; of these the first ``count``, a tensor of one number.
    fresh : (torch.Tensor, torch.Tensor)
        The rows' keys and values, ``(kv_heads, rows, head_dim)``.
    table : (cos, sin)
        From position 0 on: fp32, ``(tokens, rotary_dim / 2)``.
    temperature : float
        Of the softmax over a token's cosine similarities to the probes.
    """
    kv_heads, _, head_dim = keys.shape
    n_probes, (cos, sin), half = len(probes), table, table[0].shape[1]
    tokens = span.stop - span.start
    made = keys.new_empty(3, kv_heads, n_probes, head_dim)
    new_keys, new_values = (each.contiguous() for each in fresh)
    padded, half_padded = (max(16, triton.next_power_of_2(size)) for size in (head_dim, half))
    with on(keys.device):
        _moves[(n_probes,)](
            keys, values, new_keys, new_values, rows, probes, cos, sin,
            made[0], made[1], made[2],
            keys.stride(0), new_keys.stride(0), kv_heads, n_probes,
            HALF=half, H=triton.next_power_of_2(kv_heads), D=head_dim, DP=padded, HP=half_padded,
        )  # fmt: skip
        _shift[(triton.cdiv(tokens, SHIFTED_TOKENS),)](
            keys, values, share, made[0], made[1], made[2], count, cos, sin,
            tokens, span.start, keys.stride(0), kv_heads, n_probes, LOG2_E / temperature,
            HALF=half, PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
            T=SHIFTED_TOKENS, P=max(16, triton.next_power_of_2(n_probes)), D=head_dim,
            DP=padded, HP=half_padded, num_warps=4,
        )  # fmt: skip
