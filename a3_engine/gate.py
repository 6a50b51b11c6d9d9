"""The gate: which models may be fused. It fails closed, towards ordinary prefill.

First the structure is read, then the loaded model itself is tried on a text: a chunk computed
elsewhere and moved must equal the chunk computed in place; passes around a chunk whose states are
exact must give a full prefill's keys, values and predictions; so must decoding steps of two
requests at once. What "equal" allows is the model's own rounding; see `probe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from a3_engine.devices import input_device
from a3_engine.errors import UnsupportedModelError, shortened
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.loading import allocate
from a3_engine.fusion.selectors.a3 import A3
from a3_engine.fusion.selectors.base import Run, Selector
from a3_engine.fusion.selectors.full_reuse import FullReuse
from a3_engine.layout import Layout, Span
from a3_engine.model.attention import has_window, install
from a3_engine.model.batch_cache import step
from a3_engine.model.cache_argument import takes_cache
from a3_engine.model.hooks import arguments, install_hooks
from a3_engine.model.kv_shape import mixers
from a3_engine.model.latent import is_latent
from a3_engine.model.probe import Outcome, Probe, distance, log_probs
from a3_engine.model.rotary import Rotation, read_rotation, rotate_

# Model types proven by this project's tests; others pass the gate with a warning.
TESTED = frozenset(
    {
        "afmoe",
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "helium",
        "kimi_linear",
        "laguna",
        "lfm2",
        "lfm3",
        "llama",
        "mimo_v2_flash",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mistral4",
        "mixtral",
        "mllama_text_model",
        "nanochat",
        "nemotron",
        "nemotron_h",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "youtu",
    }
)
# Lengths of the two prompts that are tried. The longer one goes beyond a sliding window, where that
# takes no more than a bound; on accelerators it is long enough for the kernels that requests meet.
SHORT, CPU_LONG, LONG = 24, 48, 1200
CPU_BOUND, BOUND = 160, 2048
LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "linear_attention", "conv", "mlp", "moe"}
)
TAIL = 32  # so many tokens after the chunk are compared, of a short prompt a third
STEPS = 3  # of decoding
ROOM = 40  # spare slots after a prompt, as a request has them
SHIFT = 100  # a chunk is moved by so many tokens
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GateResult:
    """What the gate found.

    ``reason`` says why the model is served by ordinary prefill; it is None for a model that can be
    fused. ``tested`` tells whether its type is among those that the project's tests prove.
    """

    rotation: Rotation | None
    reason: str | None
    tested: bool


def check_model(model: PreTrainedModel, text: Sequence[int]) -> GateResult:
    """Let a model through the gate, or say why not. Installs the hooks of the fusion pass.

    Parameters
    ----------
    text : sequence of int
        Token ids that the model is tried on: of text such as it reads.
    """
    tested = model.config.get_text_config().model_type in TESTED
    try:
        if "flash" in model.config._attn_implementation:  # whose package may not be there
            install(model)
        decoder = find_decoder(model)
        rotation = read_rotation(decoder)
        install_hooks(model)
        rotation = _self_check(model, rotation, text)
    except UnsupportedModelError as error:
        return GateResult(None, str(error), tested)
    except Exception as error:  # whatever goes wrong, the gate stays closed
        what = f"{type(error).__name__}: {shortened(error)}"
        return GateResult(None, f"its own code fails in the passes of the engine ({what})", tested)
    return GateResult(rotation, None, tested)


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
    if others := set(getattr(config, "layer_types", None) or []) - LAYER_TYPES:
        raise UnsupportedModelError(f"it has layers of type {', '.join(sorted(others))}")
    if any(weight.device.type == "meta" for weight in model.parameters()):
        raise UnsupportedModelError("some of its weights are kept elsewhere (offloaded)")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not layers or not any(takes_cache(part) for layer in layers for part in layer.children()):
        raise UnsupportedModelError("its layers are not the usual attention decoder layers")
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    if any(getattr(each, "indexer", None) is not None for each in attentions):
        raise UnsupportedModelError("an indexer picks the keys that its attention sees")
    if all(mixer is not None for mixer in mixers(decoder)):
        raise UnsupportedModelError("no layer attends, so that cached chunks would save nothing")
    latent = [
        is_latent(layer)
        for layer, mixer in zip(layers, mixers(decoder), strict=True)
        if mixer is None
    ]
    if getattr(config, "kv_lora_rank", None) and not all(latent):
        raise UnsupportedModelError("it keeps latents (MLA) in a way that the engine does not know")
    return decoder


@torch.inference_mode()
def _self_check(model: PreTrainedModel, rotation: Rotation, text: Sequence[int]) -> Rotation:
    if model.dtype not in DTYPES:
        raise UnsupportedModelError(f"it computes in {model.dtype}")
    device = input_device(model)
    long = _long(model, rotation, device)
    ids = torch.tensor([(list(text) * (long // len(text) + 1))[: long + STEPS]], device=device)
    steps = torch.arange(STEPS)
    probe = Probe(model, ids, torch.cat([torch.arange(SHORT + STEPS), _tail(long), long + steps]))
    for index, (given, expected) in enumerate(zip(probe.windows, has_window(model), strict=True)):
        if bool(given) != expected:
            raise UnsupportedModelError(
                f"its layer {index} has a sliding window that its attention function is not told of"
                if expected
                else f"its layer {index} has a sliding window that its configuration does not name"
            )
    rotation = _turning(probe, rotation, torch.arange(SHORT))
    caches = [
        _check_pass(probe, rotation, A3(ratio=0.3), SHORT),
        _check_pass(probe, rotation, FullReuse(), long),
    ]
    predicted = []
    for at in range(STEPS):
        tokens = [int(ids[0, SHORT + at]), int(ids[0, long + at])]
        predicted.append(step(model, tokens, caches, device)[:, 0])
    probe.check(
        "in decoding steps for two requests",
        Outcome((), log_probs(torch.stack(predicted, 1).flatten(0, 1))),
        torch.cat([SHORT + steps, long + steps]),
    )
    return rotation


def _long(model: PreTrainedModel, rotation: Rotation, device: torch.device) -> int:
    """How many tokens the longer prompt has; none beyond which frequencies change (longrope)."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    least, most = (CPU_LONG, CPU_BOUND) if device.type == "cpu" else (LONG, BOUND)
    wanted = window + TAIL if least < window + TAIL <= most else least
    limit = rotation.max_tokens
    return wanted if limit is None else max(SHORT, min(wanted, limit - STEPS))


def _tail(n_tokens: int) -> torch.Tensor:
    """Positions of a prompt's last tokens, after the chunk."""
    return torch.arange(n_tokens - min(TAIL, n_tokens // 3), n_tokens)


def _turning(probe: Probe, rotation: Rotation, rows: torch.Tensor) -> Rotation:
    """How the layers turn keys by their frequencies; turned so, a text's are those elsewhere.

    A layer may turn them forwards, backwards (nanochat), or not at all; all of them take pairs of
    components that are adjacent, or half of the turned components apart.
    """
    far = probe.ordinary(rows, start=SHIFT)
    best: tuple[float, Rotation, list[torch.Tensor]] | None = None
    for adjacent in (False, True):
        moved, signs, total = [], [], 0.0
        tables = replace(rotation, adjacent=adjacent).tables(torch.tensor([SHIFT]))
        for (keys, _), (there, _), (cos, sin) in zip(
            probe.reference.states, far.states, tables, strict=False
        ):
            cos, sin = cos.to(keys.device), sin.to(keys.device)
            turned = {sign: keys.clone() for sign in (1, 0, -1)}
            rotate_(turned[1], cos, sin)
            rotate_(turned[-1], cos, sin, inverse=True)
            apart = {sign: distance(each, there, rows) for sign, each in turned.items()}
            sign = min(apart, key=apart.__getitem__)
            moved.append(turned[sign])
            signs.append(sign)
            total += apart[sign]
        if best is None or total < best[0]:
            turning = zip(rotation.inv_freq, signs, strict=False)
            inv_freq = [row * sign for row, sign in turning]
            best = total, Rotation(inv_freq, rotation.max_tokens, adjacent), moved
    assert best is not None
    _, fitted, moved = best
    values = (values for _, values in probe.reference.states)
    at = torch.searchsorted(probe.rows, rows)
    here = Outcome(list(zip(moved, values, strict=True)), probe.reference.log_probs[at])
    probe.check("moved to another position", here, rows, far)
    return fitted


def _check_pass(probe: Probe, rotation: Rotation, selector: Selector, n_tokens: int) -> FusedCache:
    """A pass around a chunk in the middle, whose stored states are those of the full prefill."""
    rows = _tail(n_tokens)
    chunk = Span(n_tokens // 3, int(rows[0]))
    everything, within = torch.arange(n_tokens), torch.arange(chunk.start, chunk.stop)
    fresh = torch.cat([everything[: chunk.start], rows])
    layout = Layout(n_tokens, (chunk,), chunk.start, fresh, question=rows)
    cache = allocate(probe.model, n_tokens, n_tokens + ROOM)
    for ours, (keys, values) in zip(cache.layers, probe.reference.states, strict=True):
        ours.write(within, *(each[:, :, within].to(ours.dtype) for each in (keys, values)))
    ids = probe.ids[:, :n_tokens]
    selector.prepare(Run(probe.model, rotation, cache, layout, ids[0].tolist()))
    logits = probe.model(**arguments(probe.model, ids, cache), logits_to_keep=len(rows)).logits
    probe.check(
        f"in {selector.name} at ratio {selector.ratio} around an exact chunk",
        Outcome(list(cache.stored()), log_probs(logits[0, -len(rows) :])),
        rows,
    )
    return cache
