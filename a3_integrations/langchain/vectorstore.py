"""A vector store whose documents come and go together with their chunks.

The vector store is the one place that sees every document with its id when it comes and every id
when it goes: `langchain_core.indexing`, retrievers and users all pass through ``add_documents`` and
``delete``. A record manager knows ids only, and is passed by when a user deletes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStore

from a3_engine import Chunk
from a3_integrations.langchain.documents import tag_of
from a3_integrations.langchain.settings import A3Settings


class A3VectorStore(VectorStore):
    """Any vector store, with the KV of its documents computed on adding and evicted on deleting.

    Parameters
    ----------
    store : VectorStore
        Where the documents are kept; it does all searching.
    llm : ChatA3 or A3LLM
        Whose chunks these are.
    show_progress : bool
        Show a progress bar while documents are added.

    Examples
    --------
    >>> store = A3VectorStore(InMemoryVectorStore(embeddings), llm)
    >>> index(documents, record_manager, store, cleanup="full", source_id_key="source")
    """

    def __init__(self, store: VectorStore, llm: A3Settings, *, show_progress: bool = True) -> None:
        if not isinstance(llm, A3Settings):
            raise TypeError(f"A3VectorStore needs a ChatA3 or A3LLM, not {type(llm).__name__}.")
        self.store = store
        self.llm = llm
        self.show_progress = show_progress

    def __getattr__(self, name: str) -> Any:
        """What the wrapped store has beyond a vector store's own."""
        if name.startswith("__") or name == "store":
            raise AttributeError(name)
        return getattr(self.store, name)

    # Coming and going

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        ids = self.store.add_documents(documents, **kwargs)
        self._precompute(documents, ids)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        ids = await self.store.aadd_documents(documents, **kwargs)
        await run_in_executor(None, self._precompute, documents, ids)
        return ids

    def add_texts(self, texts: Iterable[str], *args: Any, **kwargs: Any) -> list[str]:
        texts = list(texts)
        ids = self.store.add_texts(texts, *args, **kwargs)
        self._precompute([Document(page_content=text) for text in texts], ids)
        return ids

    async def aadd_texts(self, texts: Iterable[str], *args: Any, **kwargs: Any) -> list[str]:
        texts = list(texts)
        ids = await self.store.aadd_texts(texts, *args, **kwargs)
        documents = [Document(page_content=text) for text in texts]
        await run_in_executor(None, self._precompute, documents, ids)
        return ids

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        done = self.store.delete(ids, **kwargs)
        if done is not False:
            self._evict(ids)
        return done

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        done = await self.store.adelete(ids, **kwargs)
        if done is not False:
            await run_in_executor(None, self._evict, ids)
        return done

    def _precompute(self, documents: Sequence[Document], ids: Sequence[str] | None) -> None:
        tags: Sequence[str | None] = ids or ()
        if len(tags) != len(documents):  # a store that tells no ids; the documents may have some
            tags = [tag_of(document) for document in documents]
        chunks = [Chunk(d.page_content, tag) for d, tag in zip(documents, tags, strict=True)]
        self.llm.engine.precompute(chunks, progress=self.show_progress)

    def _evict(self, ids: Sequence[str] | None) -> None:
        for tag in ids or ():
            self.llm.engine.evict(tag)

    # Searching is the wrapped store's

    @property
    def embeddings(self) -> Embeddings | None:
        return self.store.embeddings

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return self.store.get_by_ids(ids)

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return await self.store.aget_by_ids(ids)

    def similarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        return self.store.similarity_search(*args, **kwargs)

    async def asimilarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        return await self.store.asimilarity_search(*args, **kwargs)

    def similarity_search_with_score(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return self.store.similarity_search_with_score(*args, **kwargs)

    async def asimilarity_search_with_score(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return await self.store.asimilarity_search_with_score(*args, **kwargs)

    def similarity_search_with_relevance_scores(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return self.store.similarity_search_with_relevance_scores(*args, **kwargs)

    async def asimilarity_search_with_relevance_scores(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return await self.store.asimilarity_search_with_relevance_scores(*args, **kwargs)

    def similarity_search_by_vector(self, *args: Any, **kwargs: Any) -> list[Document]:
        return self.store.similarity_search_by_vector(*args, **kwargs)

    async def asimilarity_search_by_vector(self, *args: Any, **kwargs: Any) -> list[Document]:
        return await self.store.asimilarity_search_by_vector(*args, **kwargs)

    def max_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        return self.store.max_marginal_relevance_search(*args, **kwargs)

    async def amax_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        return await self.store.amax_marginal_relevance_search(*args, **kwargs)

    def max_marginal_relevance_search_by_vector(self, *args: Any, **kwargs: Any) -> list[Document]:
        return self.store.max_marginal_relevance_search_by_vector(*args, **kwargs)

    async def amax_marginal_relevance_search_by_vector(
        self, *args: Any, **kwargs: Any
    ) -> list[Document]:
        return await self.store.amax_marginal_relevance_search_by_vector(*args, **kwargs)

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> A3VectorStore:
        """Not here: it could not know which store to wrap."""
        raise NotImplementedError(
            "Wrap a store that exists, A3VectorStore(store, llm), then call add_texts."
        )
