"""The gate catches fusions that are wrong, and lets right ones through, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from a3_engine import gate
from a3_engine.fusion.cache import FusedLayer
from a3_engine.model import attention, batch_cache
from a3_engine.model.masks import RowMask
from a3_engine.model.probe import TEXT
from tests.tiny import CONFIGS, SHAPE, WINDOW, tiny_model, tiny_tokenizer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]

# Its scores are large enough for a cap to change them.
SHARP = Gemma2Config(
    **SHAPE, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=1
)
BREAKS: dict[str, tuple[str, Break]] = {}


def breaks(architecture: str) -> Callable[[Break], Break]:
    def register(change: Break) -> Break:
        BREAKS[change.__name__] = architecture, change
        return change

    return register


def told(patch: Patch, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the keyword arguments of one of the attention functions."""
    ordinary = getattr(attention, name)

    def changed(*args: Any, **kwargs: Any) -> torch.Tensor:
        change(kwargs)
        return ordinary(*args, **kwargs)

    patch.setattr(attention, name, changed)


def given(patch: Patch, change: Callable[..., tuple[Any, Any, Any, RowMask]]) -> None:
    """Change query, key, value and rows on their way to the attention of a pass."""
    ordinary = attention.attend_rows

    def changed(module: Any, *states: Any, **kwargs: Any) -> torch.Tensor:
        return ordinary(module, *change(*states), **kwargs)

    patch.setattr(attention, "attend_rows", changed)


def stepped(patch: Patch, change: Callable[..., tuple[Any, Any]]) -> None:
    """Change keys and values on their way to the attention of a decoding step."""
    ordinary = attention.attend_ragged

    def changed(query: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return ordinary(query, *change(list(keys), list(values)), *args, **kwargs)

    patch.setattr(attention, "attend_ragged", changed)


def rotation(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the frequencies, ``(layers, rotary_dim / 2)``, by which chunks are turned."""
    ordinary = gate.read_rotation
    patch.setattr(
        gate,
        "read_rotation",
        lambda decoder: replace(
            read := ordinary(decoder), inv_freq=change(torch.stack(read.inv_freq))
        ),
    )


def at(rows: RowMask, positions: torch.Tensor) -> RowMask:
    return RowMask(positions.clamp(min=0), rows.key_positions)


# What a pass's attention may get wrong.


@breaks("mistral")
def no_window(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(sliding_window=None))


@breaks("mistral")
def window_one_wider(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(sliding_window=13))


@breaks("mistral")
def window_one_narrower(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(sliding_window=11))


@breaks("llama")
def window_where_none_is(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(sliding_window=16))


@breaks("llama")
def scores_a_tenth_larger(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(scaling=1.1 * kwargs["scaling"]))


@breaks("granite")
def scores_of_the_head_size(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(scaling=8**-0.5))


@breaks("gemma2-sharp")
def no_softcap(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(softcap=None))


@breaks("gemma2-sharp")
def softcap_doubled(patch: Patch) -> None:
    told(patch, "attend_rows", lambda kwargs: kwargs.update(softcap=2 * kwargs["softcap"]))


@breaks("llama")
def rows_blind_to_themselves(patch: Patch) -> None:
    given(patch, lambda q, k, v, rows: (q, k, v, at(rows, rows.positions - 1)))


@breaks("llama")
def rows_that_see_the_next(patch: Patch) -> None:
    given(patch, lambda q, k, v, rows: (q, k, v, at(rows, rows.positions + 1)))


@breaks("llama")
def the_first_key_forgotten(patch: Patch) -> None:
    given(
        patch,
        lambda q, k, v, rows: (q, k[:, :, 1:], v[:, :, 1:], at(rows, rows.positions - 1)),
    )


@breaks("qwen3")
def keys_one_token_late(patch: Patch) -> None:
    given(patch, lambda q, k, v, rows: (q, k.roll(1, 2), v, rows))


@breaks("qwen2")
def values_one_token_late(patch: Patch) -> None:
    given(patch, lambda q, k, v, rows: (q, k, v.roll(1, 2), rows))


@breaks("llama")
def key_heads_exchanged(patch: Patch) -> None:
    given(patch, lambda q, k, v, rows: (q, k.flip(1), v.flip(1), rows))


@breaks("olmo2")
def heads_grouped_in_turn(patch: Patch) -> None:
    given(
        patch,
        lambda q, k, v, rows: (
            q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2),
            k,
            v,
            rows,
        ),
    )


# What may be wrong about turning keys.


@breaks("llama-llama3")
def keys_turned_a_little_too_far(patch: Patch) -> None:
    rotation(patch, lambda frequencies: frequencies * 1.01)


@breaks("phi3")
def half_of_the_components_turned(patch: Patch) -> None:
    rotation(patch, lambda frequencies: frequencies[:, : frequencies.shape[1] // 2])


@breaks("llama")
def frequencies_in_reverse(patch: Patch) -> None:
    rotation(patch, lambda frequencies: frequencies.flip(1))


@breaks("gemma3")
def frequencies_of_the_other_layers(patch: Patch) -> None:
    rotation(patch, lambda frequencies: frequencies.roll(1, 0))


@breaks("llama-yarn")
def the_rotation_not_scaled_by_yarn(patch: Patch) -> None:
    rotation(patch, lambda frequencies: 10000.0 ** -(torch.arange(8) / 8).expand(4, 8))


# What the pass may get wrong.


@breaks("llama")
def rows_written_one_slot_early(patch: Patch) -> None:
    ordinary = FusedLayer.write
    patch.setattr(
        FusedLayer,
        "write",
        lambda self, rows, *states: ordinary(self, (rows - 1).clamp(min=0), *states),
    )


@breaks("llama")
def values_written_into_other_heads(patch: Patch) -> None:
    ordinary = FusedLayer.write
    patch.setattr(
        FusedLayer,
        "write",
        lambda self, rows, keys, values: ordinary(self, rows, keys, values.flip(1)),
    )


@breaks("llama")
def rows_counted_from_one(patch: Patch) -> None:
    ordinary = gate.arguments

    def changed(*args: Any) -> dict[str, Any]:
        called = ordinary(*args)
        if "position_ids" in called:
            called["position_ids"] = called["position_ids"] + (called["position_ids"] > 10)
        return called

    patch.setattr(gate, "arguments", changed)


# What a decoding step may get wrong.


@breaks("mistral")
def no_window_in_a_step(patch: Patch) -> None:
    told(patch, "attend_ragged", lambda kwargs: kwargs.update(sliding_window=None))


@breaks("gemma2-sharp")
def no_softcap_in_a_step(patch: Patch) -> None:
    told(patch, "attend_ragged", lambda kwargs: kwargs.update(softcap=None))


@breaks("llama")
def scores_a_tenth_larger_in_a_step(patch: Patch) -> None:
    told(patch, "attend_ragged", lambda kwargs: kwargs.update(scaling=1.1 * kwargs["scaling"]))


@breaks("llama")
def a_step_blind_to_itself(patch: Patch) -> None:
    stepped(patch, lambda k, v: ([x[:, :, :-1] for x in k], [x[:, :, :-1] for x in v]))


@breaks("llama")
def requests_exchanged_in_a_step(patch: Patch) -> None:
    stepped(patch, lambda k, v: (k[::-1], v[::-1]))


@breaks("qwen2")
def a_step_that_begins_too_late(patch: Patch) -> None:
    stepped(patch, lambda k, v: ([x[:, :, 8:] for x in k], [x[:, :, 8:] for x in v]))


@breaks("llama")
def a_step_at_the_last_position(patch: Patch) -> None:
    class Late(batch_cache.BatchCache):
        def __init__(self, caches: Any) -> None:
            super().__init__(caches)
            self.lengths = [length - 1 for length in self.lengths]

    patch.setattr(batch_cache, "BatchCache", Late)


def verdict(architecture: str, dtype: torch.dtype) -> str | None:
    text = tiny_tokenizer()(TEXT).input_ids
    model = tiny_model(SHARP if architecture == "gemma2-sharp" else architecture, dtype)
    return gate.check_model(model, text).reason


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_fusion_is_refused(monkeypatch, name, dtype):
    architecture, change = BREAKS[name]
    change(monkeypatch)
    reason = verdict(architecture, dtype)
    assert reason is not None
    assert "allowed" in reason


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("architecture", [*CONFIGS, "gemma2-sharp"])
def test_a_right_fusion_is_let_through(architecture, dtype):
    assert verdict(architecture, dtype) is None
