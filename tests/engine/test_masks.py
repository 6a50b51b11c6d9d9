"""What rows see, by hypothesis: any positions, windows and shared keys against a dense mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_engine.model.attention import attend_rows
from a3_engine.model.masks import LocalGlobal, RowMask


class Layer:
    layer_idx = 0


def places(most: int, least: int = 1) -> st.SearchStrategy[torch.Tensor]:
    return st.sets(st.integers(0, most - 1), min_size=least).map(
        lambda some: torch.tensor(sorted(some), dtype=torch.long)
    )


@st.composite
def cases(draw: st.DrawFn):
    """Rows, keys and what limits them: a window of the layer, or shared and near keys."""
    n_tokens = draw(st.integers(1, 300))
    limit = draw(st.sampled_from(["nothing", "window", "local and global"]))
    size = draw(st.integers(1, n_tokens + 2))
    # Where keys were left out, the rows' own are there.
    keys = None
    rows = draw(places(n_tokens))
    if limit != "local and global" and draw(st.booleans()):
        keys = torch.unique(torch.cat([rows, draw(places(n_tokens))]))
    local_global = None
    if limit == "local and global":
        dense_from = draw(st.integers(0, n_tokens))
        local_global = LocalGlobal(draw(places(n_tokens, 0)), size, dense_from)
    window = size if limit == "window" else None
    return n_tokens, rows, keys, window, local_global


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([16, 6]), st.booleans())
def test_rows_see_what_a_dense_mask_lets_them_see(case, head_dim, sinks):
    """A head of 16 is one that native loops take, where there are any; of 6, torch's alone."""
    n_tokens, rows, keys, window, local_global = case
    generator = torch.Generator().manual_seed(n_tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    where = torch.arange(n_tokens) if keys is None else keys
    query = random(1, 4, len(rows), head_dim)
    key, value = random(1, 2, len(where), head_dim), random(1, 2, len(where), head_dim)
    sink = random(4) if sinks else None
    mask = RowMask(rows, keys, local_global=local_global)
    got = attend_rows(
        Layer(), query, key, value, mask, scaling=0.3, sliding_window=window, s_aux=sink
    )

    at = rows[:, None]
    sees = where <= at
    if window is not None:
        sees &= where > at - window
    if local_global is not None:
        near = where > at - local_global.window
        shared = torch.isin(where, local_global.global_positions)
        sees &= near | shared | (at >= local_global.dense_from)
    wide = [states[0].double().repeat_interleave(2, 0) for states in (key, value)]
    scores = query[0].double() @ wide[0].mT * 0.3
    scores = scores.masked_fill(~sees, float("-inf"))
    if sink is not None:
        extra = sink.double()[:, None, None].expand(-1, len(rows), 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : len(where)]
    torch.testing.assert_close(
        got[0].transpose(0, 1).double(), weights @ wide[1], atol=1e-5, rtol=0
    )
