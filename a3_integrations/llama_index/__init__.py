"""A³ in LlamaIndex: an LLM, a synthesizer, an ingestion step and a document store."""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "LlamaIndex is not installed. Run: pip install 'a3-integrations[llama-index]'"
    ) from error

from a3_integrations.llama_index.docstore import A3DocumentStore
from a3_integrations.llama_index.ingestion import A3PrecomputeTransform
from a3_integrations.llama_index.llm import A3LLM
from a3_integrations.llama_index.synthesizer import A3Synthesizer

__all__ = ["A3LLM", "A3DocumentStore", "A3PrecomputeTransform", "A3Synthesizer"]
