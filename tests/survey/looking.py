"""What becomes of one configuration."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from a3_engine import A3Engine
from a3_engine.errors import shortened
from a3_engine.segments import Prompt
from tests.engine.prompts import build_prompt, fused_logits, independent_full_reuse
from tests.survey.configurations import CONFIGURATIONS
from tests.tiny import strengthened, tiny_tokenizer

SHAPE = ["prefix", "fresh", 60, "fresh", 74, "fresh", 48, "fresh"]
ANSWER = 8
TOLERANCE = 1e-3


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, values = next(some[name] for some in CONFIGURATIONS.values() if name in some)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    first, second = (whole, text) if "text_config" in values else (text, whole)
    kinds: Any = getattr(transformers, first.get(kind) or second[kind])
    torch.manual_seed(0)
    model = strengthened(kinds._from_config(CONFIG_MAPPING[kind](**deepcopy(values)), dtype=dtype))
    with torch.no_grad():  # so that norms, biases and corrections of routers matter
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model


def transformers_answer(model: PreTrainedModel, prompt: Prompt) -> list[int]:
    ids = torch.tensor([prompt.ids])
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = 2, 0
    answer = model.generate(ids, do_sample=False, max_new_tokens=ANSWER)
    return answer[0, len(prompt.ids) :].tolist()


def look(name: str, dtype: torch.dtype) -> tuple[str, str]:
    """What became of a configuration, and more about it."""
    try:
        untouched, model = build(name, dtype), build(name, dtype)
        with torch.inference_mode():
            untouched(torch.arange(3, 20)[None])
    except Exception as error:
        return "not built", shortened(error)[:160]
    with tempfile.TemporaryDirectory() as folder:
        engine = A3Engine.from_pretrained(
            model, tiny_tokenizer(), cache_dir=folder, stand_in="none"
        )
        try:
            return _judge(engine, untouched, dtype)
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {shortened(error)[:160]}"
        finally:
            engine.close()


def _judge(engine: A3Engine, untouched: PreTrainedModel, dtype: torch.dtype) -> tuple[str, str]:
    reason = engine.unsupported_reason
    if dtype != torch.float32:
        return ("let through", "") if reason is None else ("refused", reason)
    prompt = build_prompt(engine, SHAPE)
    own = engine.runtime.tokenizer.decode(
        transformers_answer(untouched, prompt), skip_special_tokens=True
    )
    for ratio in (1.0, 1.0, 0.0, 0.15):  # the chunks computed, and found
        answer = engine.generate(prompt, ratio=ratio, max_new_tokens=ANSWER)
        if (ratio == 1.0 or reason is not None) and answer.text != own:
            return "wrong", f"its answer at ratio {ratio} is another than transformers'"
    if reason is not None:
        return "refused", reason
    with torch.inference_mode():
        whole = untouched(torch.tensor([prompt.ids])).logits[0, -1]
    reuse = independent_full_reuse(engine, untouched, prompt).logits[0, -1]
    apart = {}
    for ratio, expected in ((1.0, whole), (0.0, reuse)):
        for selector in ("mend", "a3"):
            ours = fused_logits(engine, prompt, selector, ratio)
            apart[ratio] = float((ours - expected).abs().max())
            if not apart[ratio] <= TOLERANCE:
                return "wrong", f"{selector} at ratio {ratio} is off by {apart[ratio]:.1e}"
    library, chunk = engine.runtime.library, prompt.segments[2]
    assert library is not None
    nbytes = library.nbytes(chunk) // len(chunk.ids)
    return "exact", f"{apart[1.0]:.0e}, {apart[0.0]:.0e}; {nbytes:,} bytes a token"
