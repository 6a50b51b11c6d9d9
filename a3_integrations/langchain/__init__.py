"""A³ in LangChain: a chat model, a documents chain, ingestion and deletion."""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "LangChain is not installed. Run: pip install 'a3-integrations[langchain]'"
    ) from error

from a3_integrations.langchain.chains import create_a3_documents_chain
from a3_integrations.langchain.chat_model import ChatA3
from a3_integrations.langchain.ingestion import A3Precompute
from a3_integrations.langchain.llm import A3LLM
from a3_integrations.langchain.vectorstore import A3VectorStore

__all__ = ["A3LLM", "A3Precompute", "A3VectorStore", "ChatA3", "create_a3_documents_chain"]
