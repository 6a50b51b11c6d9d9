"""The same small embedding model for LangChain; its weights are inside its package (19 MB)."""

from __future__ import annotations

from pathlib import Path

import wordllama
from langchain_core.embeddings import Embeddings


class WordLlamaEmbeddings(Embeddings):
    """WordLlama's 256-dimensional static embeddings."""

    def __init__(self) -> None:
        folder = Path(wordllama.__file__).parent
        self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed(texts, norm=True).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]
