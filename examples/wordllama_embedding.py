"""A small embedding model whose weights are inside its package (19 MB)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wordllama
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr


class WordLlamaEmbedding(BaseEmbedding):
    """WordLlama's 256-dimensional static embeddings as a LlamaIndex embedding model."""

    _model: Any = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        super().__init__(model_name="wordllama-l2-256", **fields)
        folder = Path(wordllama.__file__).parent
        self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed(texts, norm=True).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)
