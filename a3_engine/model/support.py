"""The gate: which models may be fused. It fails closed, towards ordinary prefill.

First the structure is read, then the loaded model itself is tried on a few random tokens: a chunk
computed elsewhere and moved must equal the chunk computed in place; fusion passes that compute
everything, or everything around a chunk whose states are exact, must give a full prefill's logits;
so must a decoding step for two requests at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from a3_engine.errors import UnsupportedModelError
from a3_engine.fusion.batch import step
from a3_engine.fusion.fuse import FusionPass, arguments, install_hooks
from a3_engine.fusion.layout import Layout, Span
from a3_engine.fusion.loading import allocate
from a3_engine.fusion.selectors.a3 import A3
from a3_engine.fusion.selectors.full_reuse import FullReuse
from a3_engine.model.attention import install
from a3_engine.model.caching import with_cache
from a3_engine.model.rotary import Rotation, read_rotation, rotate_

# Model types proven by this project's tests; others pass the gate with a warning.
TESTED = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
PROBE_TOKENS = 24
SHIFT = 100
# Largest difference of logits or keys, relative to their size, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Support:
    """What the gate found.

    ``reason`` says why the model is served by ordinary prefill; it is None for a model that can be
    fused. ``tested`` tells whether its type is among those that the project's tests prove.
    """

    rotation: Rotation | None
    reason: str | None
    tested: bool


def examine(model: PreTrainedModel) -> Support:
    """Let a model through the gate, or say why not. Installs the hooks of the fusion pass."""
    tested = model.config.get_text_config().model_type in TESTED
    try:
        decoder = find_decoder(model)
        rotation = read_rotation(decoder)
        install(model)
        install_hooks(decoder.layers)
        _self_check(model, decoder, rotation)
    except UnsupportedModelError as error:
        return Support(None, str(error), tested)
    except Exception as error:  # whatever goes wrong, the gate stays closed
        return Support(None, f"the self-check failed: {error!r}", tested)
    return Support(rotation, None, tested)


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of decoder layers below the language-model head, if it has the shape we know.

    Raises
    ------
    UnsupportedModelError
        It is of a kind whose chunks cannot be moved.
    """
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder model")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError("it compresses keys and values together (MLA)")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError("some of its layers share one cache")
    others = set(getattr(config, "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        raise UnsupportedModelError(f"it has layers of type {', '.join(sorted(others))}")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModelError("its layers are not the usual attention decoder layers")
    return decoder


@torch.inference_mode()
def _self_check(model: PreTrainedModel, decoder: PreTrainedModel, rotation: Rotation) -> None:
    tolerance = TOLERANCE.get(model.dtype)
    if tolerance is None:
        raise UnsupportedModelError(f"it computes in {model.dtype}")
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)

    # Caches without a config: those with one drop what lies outside a sliding window.
    near, far = DynamicCache(), DynamicCache()
    full = model(input_ids=ids, **with_cache(model, near), logits_to_keep=1)
    places = torch.arange(PROBE_TOKENS, device=device)[None] + SHIFT
    decoder(input_ids=ids, position_ids=places, **with_cache(decoder, far))
    tables = rotation.tables(torch.full((PROBE_TOKENS,), SHIFT))
    for index, (cos, sin) in enumerate(tables):
        moved = near.layers[index].keys.clone()
        rotate_(moved, cos.to(moved.device), sin.to(moved.device))
        if not _close(moved, far.layers[index].keys, tolerance):
            raise UnsupportedModelError(
                f"keys of layer {index} moved to another position differ from keys computed there"
            )

    # A cached chunk in the middle, whose stored states are those of the full prefill.
    middle = Span(PROBE_TOKENS // 3, 2 * PROBE_TOKENS // 3)
    positions = torch.arange(PROBE_TOKENS)
    fresh = torch.cat([positions[: middle.start], positions[middle.stop :]])
    layout = Layout(PROBE_TOKENS, (middle,), middle.start, fresh, question=fresh[-4:])
    # All rows, only the fresh ones, and a selection in the middle of the pass.
    for selector in (FullReuse(ratio=1.0), FullReuse(ratio=0.0), A3(ratio=0.3)):
        cache = allocate(model, PROBE_TOKENS, PROBE_TOKENS)
        for ours, theirs in zip(cache.layers, near.layers, strict=True):
            rows = positions[middle.start : middle.stop]
            ours.write(rows, theirs.keys[:, :, rows], theirs.values[:, :, rows])
        FusionPass(cache, layout, selector)
        fused = model(**arguments(model, ids, cache), logits_to_keep=1)
        if not _close(fused.logits, full.logits, tolerance):
            raise UnsupportedModelError(
                f"{selector.name} at ratio {selector.ratio} around an exact chunk does not "
                "reproduce a full prefill"
            )
    # `near` goes on with its own last token, beside a request of one token.
    short, last = DynamicCache(), int(ids[0, -1])
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    expected = model(input_ids=longer, **with_cache(model, DynamicCache()), logits_to_keep=1).logits
    model(input_ids=ids[:, :1], **with_cache(model, short), logits_to_keep=1)
    if not _close(step(model, [last, last], [near, short], device)[0], expected[0], tolerance):
        raise UnsupportedModelError("a step for two requests differs from a step for one")


def _close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> bool:
    scale = reference.abs().max().float().clamp(min=1e-6)
    difference = (ours.float() - reference.float()).abs().max() / scale
    return bool(difference <= tolerance)  # NaN compares false: the gate stays closed
