"""Attention for scattered rows: the one place where the fusion pass meets the model's attention.

transformers lets a program register attention functions by name; every Llama-like model calls the
registered function with the queries after rotation and the keys and values that the cache returned.
The function here does ordinary attention, by the implementation that the model had before, unless
the layer's `attention_mask` is a :class:`RowMask`: then the rows stand at arbitrary positions and
see exactly the keys at positions not after their own, or those of them that
`RowMask.local_global` leaves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from a3_engine import native
from a3_engine.devices import send
from a3_engine.errors import UnsupportedModelError
from a3_engine.model.cache_argument import other_cache
from a3_engine.model.latent import Kept, is_latent
from a3_engine.model.masks import Addressed, DecodeMask, RowMask, Scratch

PREFIX = "a3_"
# Arguments of attention functions that say what `RowMask` says, or nothing where nobody trains.
HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
FUSED_KEYS = (
    3072  # up to this number of keys the fused kernel is the fastest for one token everywhere
)


class Captured(Exception):
    """Carries a layer's query, key and value out of the attention function, before attention.

    Attributes
    ----------
    states : (query, key, value)
        After rotation, ``(prompts, heads or kv_heads, tokens, head_dim)``.
    kept : (key, value)
        What the layer keeps of them.
    window : int or None
        The sliding window that its attention is told of.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> None:
        super().__init__("captured")
        self.states = (query, key, value)
        self.kept = (key, value)
        self.window = window


class Capture:
    """Stands in for the attention mask where only the projected states are wanted."""


def install(model: PreTrainedModel) -> None:
    """Route the model's attention through this module; ordinary calls behave as before."""
    current = model.config._attn_implementation
    if current.startswith(PREFIX):
        return
    if "flash" in current:  # transformers would look for a package by the new name
        current = "sdpa" if model._supports_sdpa else "eager"
    name = PREFIX + current

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: Any,  # of a decoding step, those of each request
        value: Any,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(attention_mask, RowMask):
            return attend_rows(module, query, key, value, attention_mask, **kwargs), None
        if isinstance(attention_mask, DecodeMask):
            return attend_ragged(query, key, value, attention_mask, **kwargs), None
        if isinstance(attention_mask, Capture):
            raise Captured(query, key, value, kwargs.get("sliding_window"))
        ordinary = (
            inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
            if current == "eager"
            else ALL_ATTENTION_FUNCTIONS[current]
        )
        return ordinary(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention)
    if current in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[current])
    model.set_attn_implementation(name)


def attend_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowMask,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Attention of scattered rows over the cache; each sees what `rows` says, and nothing else.

    Parameters
    ----------
    query : torch.Tensor
        Shape ``(prompts, heads, rows, head_dim)``, rotated to the rows' positions.
    key, value : torch.Tensor
        Shape ``(prompts, kv_heads, tokens, head_dim)``.
    rows : RowMask
        Where the rows and the keys stand, in all prompts alike.
    scaling, sliding_window, softcap, s_aux
        As the model passes them to its attention function. ``s_aux`` are attention sinks: of each
        head one more score, whose weight goes nowhere.

    Returns
    -------
    torch.Tensor
        Shape ``(prompts, rows, heads, head_dim)``, of the values' size.
    """
    refuse_unknown(others)
    if rows.observer is not None:
        rows.observer(module.layer_idx, query, key, rows, scaling)  # type: ignore[arg-type]
    keys, values = list(key[:, None]), list(value[:, None])
    if native.attends(query, keys, values, softcap):
        first, last = rows.seen(sliding_window, query.device)
        shared = (
            send(rows.local_global.global_positions, query.device)
            if rows.local_global is not None
            else None
        )
        return native.attend(query, keys, values, first, last, scaling, shared, softcap, s_aux)
    sinks = (
        None if s_aux is None else s_aux.view(1, key.shape[1], -1, 1).expand(len(key), -1, -1, 1)
    )
    attend = _attention_for(query, rows.scratch, softcap, sinks)
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    for block in rows.blocks(sliding_window, query):
        attend(
            query[:, :, block.rows],
            key[:, :, block.keys],
            value[:, :, block.keys],
            block.mask,
            scaling,
            output[:, :, block.rows],
        )
    return output.transpose(1, 2)


def attend_ragged(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    ragged: DecodeMask,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Attention of the newest token of each request over its own cache.

    Parameters
    ----------
    query : torch.Tensor
        Shape ``(requests, heads, 1, head_dim)``.
    keys, values : sequence of torch.Tensor, or Addressed
        Each ``(1, kv_heads, its tokens, head_dim)``; the last token is the query's.

    Returns
    -------
    torch.Tensor
        Shape ``(requests, 1, heads, head_dim)``.
    """
    refuse_unknown(others)
    if isinstance(keys, Addressed):
        return keys.attend(query, scaling, sliding_window, softcap, s_aux)
    n_requests, heads, head_dim = query.shape[0], query.shape[1], query.shape[3]
    kv_heads = keys[0].shape[1]
    if native.attends(query, keys, values, softcap):
        last = torch.tensor([[key.shape[2]] for key in keys])
        first = (last - sliding_window).clamp(min=0) if sliding_window else torch.zeros_like(last)
        first, last = send(first, query.device), send(last, query.device)
        return native.attend(
            query, keys, values, first, last, scaling, softcap=softcap, sinks=s_aux
        )
    # Heads that share keys stand as rows: a kernel for single heads may copy the keys for each.
    grouped = query.reshape(n_requests, kv_heads, heads // kv_heads, head_dim)
    output = grouped.new_empty(*grouped.shape[:-1], values[0].shape[-1])
    sinks = None if s_aux is None else s_aux.view(1, kv_heads, 1, -1)
    for place, (key, value) in enumerate(zip(keys, values, strict=True)):
        one, into = grouped[place : place + 1], output[place : place + 1]
        if sliding_window:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        few = key.shape[2] <= FUSED_KEYS
        attend = _attention_for(one, ragged.scratch, softcap, sinks, few)
        attend(one, key, value, None, scaling, into)
    return output.view(n_requests, 1, heads, -1)


def _attention_for(
    query: torch.Tensor,
    scratch: Scratch,
    softcap: float | None,
    sinks: torch.Tensor | None,
    few: bool = False,
) -> Callable[..., None]:
    """What attends a block of these queries quickest, into its last argument."""
    if softcap is None and sinks is None and (few or not _multiplies_faster(query)):
        return _attend_fused
    return partial(_attend_plain, scratch=scratch, softcap=softcap, sinks=sinks)


def _multiplies_faster(query: torch.Tensor) -> bool:
    """Whether plain products beat the fused kernel: bf16 on a CPU that multiplies it natively.

    638 rows over 4,144 keys: 25 ms against 47, with a relative error of 0.0044 against 0.0022
    (2 cores with AVX512-bf16; the rounding of bf16 itself is 0.002). One token over few keys is
    faster through the kernel, which has no product to prepare.
    """
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and torch.cpu._is_avx512_bf16_supported()


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    output: torch.Tensor,
) -> None:
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (key.shape[2] - mask.shape[1], 0))
    output.copy_(
        scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    )


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    output: torch.Tensor,
    *,
    scratch: Scratch,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Grouped matrix products; also for softcaps and sinks, which no fused kernel has.

    ``sinks`` are ``(prompts, kv_heads, heads of one, rows)``, the last of which may be one.
    """
    (n_prompts, heads, n_rows, head_dim), n_keys = query.shape, key.shape[2]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    kv_heads = len(keys)  # of all prompts
    group = n_prompts * heads // kv_heads
    grouped = (query * scaling).reshape(kv_heads, group * n_rows, head_dim)
    # A CPU keeps the scores of one head in its caches, and those of one token anyway.
    on_cpu = query.device.type == "cpu"
    at_once = 1 if on_cpu and mask is not None else kv_heads
    shape = (at_once, grouped.shape[1], n_keys)
    if on_cpu:
        scores = scratch.take(math.prod(shape), query.dtype).view(shape)
    else:
        scores = query.new_empty(shape)
    by_row = scores.view(at_once, -1, n_rows, n_keys)
    attended = grouped
    if values.shape[-1] != head_dim:
        attended = grouped.new_empty(*grouped.shape[:-1], values.shape[-1])
    for head in range(0, kv_heads, at_once):
        some = slice(head, head + at_once)
        multiply(grouped[some], keys[some].transpose(1, 2), scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            by_row[..., n_keys - mask.shape[1] :] += mask
        if sinks is not None:  # what they leave to the keys
            left = torch.sigmoid(by_row.float().logsumexp(-1) - sinks.flatten(0, 1)[some].float())
        torch.softmax(scores, dim=-1, out=scores)  # computes in fp32 whatever the dtype
        multiply(scores, values[some], attended[some])
        if sinks is not None:
            attended[some] *= left.flatten(1)[..., None]
    output.copy_(attended.view(output.shape))


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """``(n, a, b) @ (n, b, c)``; one by one on a CPU, where `bmm` copies slices of a buffer."""
    if out.device.type != "cpu":
        torch.bmm(left, right, out=out)
        return
    for one, other, product in zip(left, right, out, strict=True):
        torch.mm(one, other, out=product)


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` for what would change the attention if it were honoured."""
    if unknown := [name for name in arguments.keys() - HARMLESS if arguments[name] is not None]:
        raise UnsupportedModelError(
            f"its attention takes {', '.join(sorted(unknown))}, which the engine does not know"
        )


def has_window(model: PreTrainedModel) -> list[bool]:
    """Which layers attend within a sliding window only."""
    config = model.config.get_text_config()
    if types := getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in types]
    return [bool(getattr(config, "sliding_window", None))] * config.num_hidden_layers


def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """What a decoder layer calls its attention function with, without running that.

    Leaving the layer by an exception from the attention function works for every architecture:
    norms before rotation, fused projections and partial rotation are the model's own code.
    """
    kept = Kept() if is_latent(layer) else None
    try:
        layer.forward(*args, **{**other_cache(kwargs, kept), "attention_mask": Capture()})
    except Captured as captured:
        if kept is not None and kept.states is not None:
            captured.kept = kept.states
        # Its traceback would hold this frame, its callers and with them the cache, in a circle.
        return captured.with_traceback(None)
    raise RuntimeError(
        f"{type(layer).__name__} did not call the registered attention function; "
        "was the model's attention implementation changed after the engine was built?"
    )
