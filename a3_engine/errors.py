"""The few errors a user can meet. Each message names the problem and the way out."""

from __future__ import annotations


class A3Error(Exception):
    """Base class of every error that this package raises on purpose."""


class ContextOverflowError(A3Error):
    """The prompt and the room for the answer do not fit into the model's context window.

    Not a `ValueError`: LlamaIndex's synthesizers catch those and answer "Empty Response".
    """

    def __init__(self, prompt_tokens: int, max_new_tokens: int, context_window: int) -> None:
        excess = prompt_tokens + max_new_tokens - context_window
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the answer may take {max_new_tokens}, "
            f"together {excess} more than the model's context window of {context_window}. "
            "Retrieve fewer or shorter chunks, lower max_new_tokens, or use a model with a longer "
            "context. Nothing was cut."
        )
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_window = context_window


class ModelLoadError(A3Error, RuntimeError):
    """A model or its tokenizer could not be found or read."""


class UnsupportedModelError(A3Error):
    """Chunks of this model cannot be moved between positions; ordinary prefill serves it."""


class StoreError(A3Error, RuntimeError):
    """The chunk store cannot be opened or written."""
