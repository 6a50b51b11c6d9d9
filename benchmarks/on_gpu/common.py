"""What the steps of `benchmarks/gpu.py` share: models, prompts, times, and where results go."""

from __future__ import annotations

import atexit
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from a3_engine import A3Engine
from a3_engine.model.cache_argument import with_cache
from a3_engine.segments import Prompt, Segment
from tests.tiny import tiny_tokenizer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
NO_END = 10**6  # a token that no vocabulary has, so that answers have their full length
SHM = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


class Bench:
    """One run: its sizes, its results, and the models that its steps share.

    Parameters
    ----------
    out : Path
        Folder of `gpu.json`, written after every line.
    tiny : bool
        Tiny models and short prompts, to try the script itself.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        self.out, self.tiny = out, tiny
        self.started = time.perf_counter()
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.chunk_tokens = 32 if tiny else 512
        self.contexts = (64, 128) if tiny else (4096, 8192, 32_768)
        self.engine: A3Engine | None = None
        out.mkdir(parents=True, exist_ok=True)

    def say(self, row: str, **values: Any) -> None:
        """Print a line and write it down."""
        self.results.setdefault(row, []).append(values)
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        print(f"[{time.perf_counter() - self.started:5.0f} s] {row}: {shown}", flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1, default=str))

    def config(self, name: str) -> PretrainedConfig:
        """The shape of a well-known model."""
        config: PretrainedConfig = _shapes()[name]
        if self.tiny:
            config.update(
                {
                    "vocab_size": 320,
                    "hidden_size": 64,
                    "intermediate_size": 96,
                    "head_dim": 16,
                    "num_hidden_layers": 6,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 2,
                }
            )
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:6]
        return config

    def llama(self) -> A3Engine:
        """An engine around Llama-3.1-8B's shape, made once."""
        if self.engine is None:
            self.engine = engine_of(random_model(self.config("Llama-3.1-8B")))
        return self.engine

    def stored(self, engine: A3Engine, number: int) -> list[Segment]:
        """So many chunks, in the engine's store."""
        vocabulary = engine.runtime.model.config.vocab_size
        chunks = [chunk(at, vocabulary, self.chunk_tokens) for at in range(number)]
        library = engine.runtime.library
        assert library is not None
        list(library.store_all(library.missing(chunks)))
        return chunks


def _shapes() -> dict[str, PretrainedConfig]:
    return {
        "Llama-3.1-8B": LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "Qwen3-8B": Qwen3Config(
            vocab_size=151_936,
            hidden_size=4096,
            intermediate_size=12_288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=1,
            eos_token_id=2,
        ),
    }


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object], rounds: int = 5) -> float:
    """Median milliseconds, after one call that warms up."""
    call()
    taken = []
    for _ in range(rounds):
        started = now()
        call()
        taken.append(1e3 * (now() - started))
    return statistics.median(taken)


def on_device(call: Callable[[], object], rounds: int = 20) -> float:
    """Microseconds that the device works on one call, by events around many."""
    call()
    if not CUDA:
        return 1e3 * timed(call, 3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    begin.record()
    for _ in range(rounds):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / rounds


def random_model(config: PretrainedConfig) -> Any:
    """Random weights in bf16, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def engine_of(model: Any, **options: Any) -> A3Engine:
    """An engine with a store of its own in shared memory."""
    folder = tempfile.mkdtemp(dir=SHM)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    engine = A3Engine.from_pretrained(
        model, tiny_tokenizer(), cache_dir=folder, size_limit=2**36, stand_in="none", **options
    )
    model.generation_config.eos_token_id = NO_END
    return engine


def chunk(number: int, vocabulary: int, length: int) -> Segment:
    """Random tokens, the same for the same number."""
    made = torch.Generator().manual_seed(number)
    ids = torch.randint(4, vocabulary, (length,), generator=made).tolist()
    return Segment("chunk", tuple(ids), f"chunk {number} of {length}")


def prompt_of(engine: A3Engine, chunks: list[Segment], question_tokens: int) -> Prompt:
    """The chunks with a fresh token after each, and a question of so many tokens."""
    vocabulary = engine.runtime.model.config.vocab_size
    parts = [Segment("prefix", engine.runtime.planner.prefix_ids)]
    for each in chunks:
        parts += [each, Segment("fresh", (5,))]
    parts.append(Segment("fresh", chunk(10**6 + question_tokens, vocabulary, question_tokens).ids))
    return Prompt(tuple(parts), len(parts) - 1)


def fused_logits(engine: A3Engine, prompt: Prompt, selector: str, ratio: float) -> torch.Tensor:
    """The last token's, by a method, fp32 on the CPU."""
    _, cache = engine.prepare(prompt, selector=selector, ratio=ratio)
    return _logits(engine, prompt, cache)


def plain_logits(engine: A3Engine, prompt: Prompt) -> torch.Tensor:
    """The last token's, by an ordinary full prefill, fp32 on the CPU."""
    return _logits(engine, prompt, DynamicCache())


def _logits(engine: A3Engine, prompt: Prompt, cache: Any) -> torch.Tensor:
    model = engine.runtime.model
    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1).logits
    return logits[0, -1].float().cpu()


def off(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, as a share of the largest magnitude."""
    return float((ours - reference).abs().max() / reference.abs().max())
