"""Names for what a chunk's KV depends on. Anything unknown is a miss, never a guess."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine.errors import UnsupportedModelError

FORMAT_VERSION = 2
SAMPLES = 64
PIECE = 2**24  # values summed at once: torch makes a copy of twice their size
# What an adapter's layer (peft's) does with its weights.
ADAPTER = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
# What a config records about how it was saved or is run, not about what the model computes.
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation"}


def digest(*parts: object) -> str:
    """sha256 over the parts as JSON, so that neighbouring parts cannot run into each other."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Identity of what the model computes: its config, and the content of all its weights.

    Adapters count: their weights, which of them are active, and how they are scaled. Every weight
    enters as the sum of its bits read as integers, which no thread count changes, and by evenly
    spread samples.

    Raises
    ------
    UnsupportedModelError
        Some weights cannot be read: they are elsewhere (offloaded), or of an unknown kind.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    hasher = hashlib.sha256(digest(type(model).__name__, config, str(model.dtype)).encode())
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            state = [getattr(module, each, None) for each in ADAPTER]
            hasher.update(digest(name, state).encode())
    for name, tensor in _weights(model):
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedModelError(f"its weights cannot be read: {name} is no tensor")
        if tensor.is_meta:
            raise UnsupportedModelError(f"its weight {name} is kept elsewhere (offloaded)")
        flat = tensor.detach().reshape(-1)
        bits = flat.contiguous().view(torch.uint8)
        wide = torch.int32 if bits.numel() % 4 == 0 and bits.storage_offset() % 4 == 0 else None
        numbers = bits.view(wide) if wide else bits
        pieces = (numbers[at : at + PIECE] for at in range(0, len(numbers), PIECE))
        checksum = sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES].float().cpu().tolist()
        hasher.update(
            digest(name, list(tensor.shape), str(tensor.dtype), checksum, sample).encode()
        )
    return hasher.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by name, once each, in plain tensors.

    `state_dict` is not asked for them: it changes what bitsandbytes has packed for a CPU.
    """
    seen = set()
    for path, module in model.named_modules():
        _refuse_hidden(path, module)
        own: dict[str, Any] = {**module._parameters, **_saved_buffers(module)}
        states = [(k, w.quant_state) for k, w in own.items() if hasattr(w, "quant_state")]
        for name, state in states:  # bitsandbytes': what its packed numbers mean
            own |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        if not states and type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            module._save_to_state_dict(own := {}, "", True)  # its weights are not its parameters
        for name, weight in own.items():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield from _plain(f"{path}.{name}", weight)


def _saved_buffers(module: nn.Module) -> dict[str, Any]:
    """Buffers that are saved with a model; GPTQ and AWQ keep their weights there."""
    buffers = module._buffers.items()
    return {k: v for k, v in buffers if k not in module._non_persistent_buffers_set}


def _refuse_hidden(path: str, module: nn.Module) -> None:
    """Some kernels repack a linear layer's weights into memory that only they know."""
    if not (hasattr(module, "in_features") or hasattr(module, "infeatures")):
        return
    if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
        return  # which says what they are, or why they cannot be had
    tensors = (*module.parameters(), *module.buffers())
    if not any(each.dim() > 1 for each in tensors):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise UnsupportedModelError(f"the weights of its layer {path} ({kind}) cannot be read")


def _plain(name: str, weight: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight, or the tensors that a subclass (torchao's) is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    parts, context = weight.__tensor_flatten__()
    for part in parts:
        yield from _plain(f"{name}.{part} {context}", getattr(weight, part))


class Watch:
    """Notices changes of weights and adapters without reading any weight.

    What is done to a weight in place, another one in its place, and adapters that are switched,
    scaled or merged are seen; adapters that are added later, or changed through ``.data``, are not.
    Buffers that are saved with the model are weights too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held = list(self._now())  # else a new weight could take the address of an old one
        self._adapters = [each for each in self._modules if hasattr(each, "merged_adapters")]
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether something is not as it was when this was made."""
        return self._look() != self._seen

    def _now(self) -> Iterator[torch.Tensor]:
        for module in self._modules:
            for each in (*module._parameters.values(), *_saved_buffers(module).values()):
                if each is not None and not each.is_inference():
                    yield each

    def _look(self) -> list[object]:
        weights = [(id(each), each.data_ptr(), each._version) for each in self._now()]
        return [weights, *([str(getattr(a, n, None)) for n in ADAPTER] for a in self._adapters)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: its serialized rules where it has them, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest(rules, type(tokenizer).__name__ if backend is None else "tokenizers")


@lru_cache(maxsize=1024)
def chunk_key(engine_fingerprint: str, context: tuple[int, ...], ids: tuple[int, ...]) -> str:
    """The store's key of a chunk: who computes it, what stands before it, and its token ids."""
    return digest(FORMAT_VERSION, engine_fingerprint, list(context), list(ids))
