"""The few errors a user can meet. Each message names the problem and the way out."""

from __future__ import annotations


class A3Error(Exception):
    """Base class of every error that this package raises on purpose."""


class ContextOverflowError(A3Error):
    """The prompt and the room for the answer do not fit into the model's context window.

    Not a `ValueError`: LlamaIndex's synthesizers catch those and answer "Empty Response".
    """


class ModelLoadError(A3Error, RuntimeError):
    """A model or its tokenizer could not be found or read."""


class UnsupportedModelError(A3Error):
    """Chunks of this model cannot be moved between positions; ordinary prefill serves it."""


class StoreError(A3Error, RuntimeError):
    """The chunk store cannot be opened or written."""


def shortened(error: BaseException) -> str:
    """An error of another library in one line; some of them list everything there is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
