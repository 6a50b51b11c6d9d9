"""What a request may be asked with: the one list that the engine and both adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from a3_engine.decoding.compression.base import Compression
from a3_engine.decoding.sampling import strings
from a3_engine.fusion.selectors.base import Selector
from a3_engine.messages import Chunk

METHOD_OPTIONS = ("quality", "selector", "ratio", "compression", "keep")
# Fields of the adapters: what decides about store and loading, and what a call may change.
ENGINE_FIELDS = (
    "cache_dir",
    "device",
    "dtype",
    "trust_remote_code",
    "encode_prefix",
    "stand_in",
    "size_limit",
    "codec",
    "turns_kept_s",
)
CALL_FIELDS = (
    *METHOD_OPTIONS,
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "stop",
    "logprobs",
    "top_logprobs",
    "seed",
    "conversation",
)


class MethodOptions(TypedDict, total=False):
    """Override the engine's method for one request."""

    quality: str | None
    selector: str | Selector | None
    ratio: float | None
    compression: str | Compression | None
    keep: float | None


class RequestOptions(MethodOptions, total=False):
    """What `A3Engine.generate` and its like take beside the request.

    ``chunks`` are documents to stand before a question given as text; ``conversation`` names the
    one that the request belongs to, see `A3Engine.plan`. Those from
    ``max_new_tokens`` on are the fields of :class:`~a3_engine.decoding.sampling.Sampling`.
    """

    chunks: Sequence[str | Chunk]
    conversation: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    grammar: str | None
    logprobs: int | None
    seed: int | None
    shown: Sequence[str]


def in_engines_words(options: dict[str, Any]) -> dict[str, Any]:
    """An adapter's settings of a request, as :class:`RequestOptions` has them.

    ``logprobs`` says whether log probabilities are wanted, as in OpenAI's requests, and
    ``top_logprobs`` of how many tokens.
    """
    wanted, n_top = options["logprobs"], options["top_logprobs"]
    if not isinstance(wanted, bool | int | None):
        raise TypeError(f"logprobs is True or False, not {type(wanted).__name__}.")
    read = {name: value for name, value in options.items() if name != "top_logprobs"}
    stop = strings("stop", options["stop"])
    return read | {"logprobs": n_top if wanted else None, "stop": stop}
