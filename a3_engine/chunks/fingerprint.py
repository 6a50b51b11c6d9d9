"""Names for what a chunk's KV depends on. Anything unknown is a miss, never a guess."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 2
SAMPLES = 64
# What a config records about how it was saved or is run, not about what the model computes.
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation"}


def digest(*parts: object) -> str:
    """sha256 over the parts as JSON, so that neighbouring parts cannot run into each other."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Identity of what the model computes: its config, and the content of all its weights.

    Adapters count, since their weights are among the parameters. Every weight enters as the sum of
    its bits read as integers, which no thread count changes, and by evenly spread samples.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    hasher = hashlib.sha256(digest(type(model).__name__, config, str(model.dtype)).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        flat = tensor.detach().reshape(-1)
        bits = flat.contiguous().view(torch.uint8)
        wide = torch.int32 if bits.numel() % 4 == 0 and bits.storage_offset() % 4 == 0 else None
        checksum = (bits.view(wide) if wide else bits).sum(dtype=torch.int64).item()
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES].float().cpu().tolist()
        hasher.update(
            digest(name, list(tensor.shape), str(tensor.dtype), checksum, sample).encode()
        )
    return hasher.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: its serialized rules where it has them, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest(rules, type(tokenizer).__name__ if backend is None else "tokenizers")


@lru_cache(maxsize=1024)
def chunk_key(engine_fingerprint: str, behind: tuple[int, ...], ids: tuple[int, ...]) -> str:
    """The store's key of a chunk: who computes it, what stands before it, and its token ids."""
    return digest(FORMAT_VERSION, engine_fingerprint, list(behind), list(ids))
