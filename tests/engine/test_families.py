"""Families of architectures: fused and exact in fp32, and let through in bf16."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from a3_engine import A3Engine, gate, native
from a3_engine.fusion.selectors import SELECTORS, make_selector
from a3_engine.model.packing import pack
from a3_engine.model.probe import TEXT
from a3_engine.segments import Segment
from tests.engine.follow_ups import extended, follow_up_logits
from tests.engine.prompts import build_prompt, full_prefill, fused_logits, independent_full_reuse
from tests.survey.looking import build, look
from tests.tiny import tiny_tokenizer

# Those of the survey whose types count as tested; test_exactness.py has the others.
LATENT = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "youtu"]
FAMILIES = [
    *("ministral", "ministral3", "olmo3", "seed_oss", "apertus", "arcee", "starcoder2", "stablelm"),
    *("nemotron", "gpt_neox", "phi", "gemma", "vaultgemma", "gemma3n_text", "gemma4_text, alike"),
    *("gemma4_text, as 31B", "gemma4_text, as 26B-A4B", "gemma4_text, as E4B"),
    *("gemma4_unified_text", "gemma4, as E4B", "laguna", "mimo_v2_flash"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "minimax_m2"),
    *("dots1", "phimoe", "gpt_oss", "granitemoe_swa", "glm", "glm4", "cohere", "ernie4_5"),
    *("ernie4_5_moe", "helium", "nanochat", "exaone4", "exaone_moe", "afmoe"),
    *("qwen2_5_vl", "gemma3", "mistral3, ministral3", "mllama"),
    *("qwen3_5", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "lfm3"),
    "kimi_linear",
    *LATENT,
]
SEVERAL_SHAPES = ["gemma4_text, as 31B", "gemma4_text, as E4B", "mimo_v2_flash", "deepseek_v3"]
HYBRIDS = ["qwen3_5", "nemotron_h"]
MIX = ["prefix", "fresh", 9, "fresh", 14, "fresh"]


@pytest.fixture
def make(tmp_path):
    engines = []

    def engine(name: str, **options: str) -> A3Engine:
        cache_dir = tmp_path / "cache"
        engine = A3Engine.from_pretrained(
            build(name), tiny_tokenizer(), cache_dir=cache_dir, **options
        )
        engines.append(engine)
        return engine

    yield engine
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exact(name):
    """At ratio 1.0 and 0.0, and in decoding."""
    state, why = look(name, torch.float32)
    assert state == "exact", why


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("name", [*SEVERAL_SHAPES, *HYBRIDS])
def test_layers_of_several_shapes_go_through_a_codec(make, name, codec):
    """What is read back answers as what was computed, and is the raw chunk up to the codec."""
    logits, raw = {}, None
    for stored in ("raw", codec, codec):
        engine = make(name, codec=stored)
        prompt = build_prompt(engine, ["prefix", "fresh", 40, "fresh"])
        logits.setdefault(stored, []).append(fused_logits(engine, prompt, "full_reuse", 0.0))
        kv = engine.runtime.library.fetch(prompt.segments[2]).kv
        raw = raw or kv
        for ours, exact in ((kv.keys, raw.keys), (kv.values, raw.values)):
            assert ours.shape == exact.shape
            assert (ours - exact).norm() <= 0.15 * exact.norm()
    assert logits[codec][0].equal(logits[codec][1])


@pytest.mark.parametrize("name", [*SEVERAL_SHAPES, *HYBRIDS])
def test_requests_of_one_batch_decode_alike(make, name):
    engine = make(name)
    prompts = [build_prompt(engine, shape) for shape in (MIX, ["prefix", 30, "fresh"])]
    alone = [engine.generate(p, ratio=1.0, max_new_tokens=8).text for p in prompts]
    with ThreadPoolExecutor(2) as threads:
        together = threads.map(
            lambda p: engine.generate(p, ratio=1.0, max_new_tokens=8).text, prompts
        )
        assert list(together) == alone


@pytest.mark.parametrize("name", ["gemma4_text, as E4B", "deepseek_v3", *HYBRIDS])
@pytest.mark.parametrize("selector", ["full_prefill", "mend"])
def test_a_kept_turn_goes_on_exactly(make, name, selector):
    engine, method = make(name), make_selector(selector, 1.0)
    prompt = build_prompt(engine, MIX)
    engine.generate(prompt, selector=method, max_new_tokens=6)
    prompt = extended(engine, prompt, [Segment("fresh", (7, 8, 9))])
    kept = follow_up_logits(engine, prompt, method, reuse=True)
    expected = full_prefill(engine, prompt).logits[0, -1]
    torch.testing.assert_close(kept, expected, atol=1e-3, rtol=0)


def test_every_method_looks_through_latents(make):
    """But those that compare stored keys or cut them head by head say that they cannot."""
    engine = make("deepseek_v3")
    prompt = build_prompt(engine, ["prefix", 40, "fresh", 30, "fresh"])
    whole = full_prefill(engine, prompt).logits[0, -1]
    reuse = independent_full_reuse(engine, engine.runtime.model, prompt).logits[0, -1]
    for selector in SELECTORS.keys() - {"full_prefill"}:
        for ratio, expected in ((1.0, whole), (0.0, reuse)):
            got = fused_logits(engine, prompt, selector, ratio)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
        if selector != "samkv":
            engine.generate(prompt, selector=selector, ratio=0.3, max_new_tokens=4)
    with pytest.raises(ValueError, match="latents"):
        engine.generate(prompt, selector="samkv", ratio=0.3)
    with pytest.raises(ValueError, match="latent"):
        engine.generate(prompt, compression="snapkv")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_let_through_in_bf16(name):
    text = tiny_tokenizer()(TEXT).input_ids
    assert gate.check_model(build(name, torch.bfloat16), text).reason is None


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_family_may_be_packed(name):
    """None of its code looks at weights that are laid out for a CPU."""
    model, ids = build(name), torch.arange(3, 20)[None]
    assert model.config.get_text_config().model_type in gate.TESTED
    expected = model(ids).logits
    pack(model)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe_swa"])
def test_sinks_are_exact_without_native_loops(make, name, monkeypatch):
    monkeypatch.setattr(native, "attends", lambda *_: False)
    engine = make(name)
    prompt = build_prompt(engine, MIX)
    whole = full_prefill(engine, prompt).logits[0, -1]
    got = fused_logits(engine, prompt, "mend", 1.0)
    torch.testing.assert_close(got, whole, atol=1e-3, rtol=0)
    fused = engine.generate(prompt, ratio=1.0, max_new_tokens=12)
    assert fused.text == engine.generate(prompt, selector="full_prefill", max_new_tokens=12).text
