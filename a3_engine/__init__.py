"""KV-cache fusion for retrieved chunks, on torch and transformers."""

from importlib.metadata import PackageNotFoundError, version

from a3_engine.chunks.store import StoreOptions
from a3_engine.engine import A3Engine
from a3_engine.errors import (
    A3Error,
    ContextOverflowError,
    ModelLoadError,
    StoreError,
    UnsupportedModelError,
)
from a3_engine.ingestion import Precomputed
from a3_engine.prompt import Chunk, Message
from a3_engine.report import FusionReport
from a3_engine.segments import Prompt
from a3_engine.stream import Answer, AsyncTokenStream, TokenStream

try:
    __version__ = version("a3-integrations")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

__all__ = [
    "A3Engine",
    "A3Error",
    "Answer",
    "AsyncTokenStream",
    "Chunk",
    "ContextOverflowError",
    "FusionReport",
    "Message",
    "ModelLoadError",
    "Precomputed",
    "Prompt",
    "StoreError",
    "StoreOptions",
    "TokenStream",
    "UnsupportedModelError",
    "__version__",
]
