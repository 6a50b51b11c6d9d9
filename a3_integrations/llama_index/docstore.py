"""A document store whose deletions reach the chunk store."""

from __future__ import annotations

from typing import Any

from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore

from a3_engine import A3Engine
from a3_integrations.llama_index.llm import A3LLM


class A3DocumentStore(KVDocumentStore):
    """Evicts a document's chunks whenever the document is deleted or replaced.

    An `IngestionPipeline` tells nobody but its document store and its vector store what it deletes.
    With this one as its ``docstore``, the strategies ``upserts`` and ``upserts_and_delete`` evict;
    so does ``index.delete_ref_doc(..., delete_from_docstore=True)``.

    Parameters
    ----------
    llm : A3LLM or A3Engine
        Whose chunks are evicted.
    docstore : KVDocumentStore or None
        Where the documents are: a simple, Redis, MongoDB or other key-value document store. In
        memory where None.
    """

    def __init__(self, llm: A3LLM | A3Engine, docstore: KVDocumentStore | None = None) -> None:
        self._inner = docstore or SimpleDocumentStore()
        if not isinstance(self._inner, KVDocumentStore):
            raise TypeError(
                f"A3DocumentStore wraps a key-value document store, not a "
                f"{type(self._inner).__name__}. Call llm.engine.evict(doc_id) where it deletes."
            )
        super().__init__(  # the same collections of the same store
            self._inner._kvstore,
            self._inner._namespace,
            self._inner._batch_size,
            self._inner._node_collection_suffix,
            self._inner._ref_doc_collection_suffix,
            self._inner._metadata_collection_suffix,
        )
        self._engine = llm.engine if isinstance(llm, A3LLM) else llm

    def persist(self, *args: Any, **kwargs: Any) -> None:
        self._inner.persist(*args, **kwargs)

    def delete_document(self, doc_id: str, raise_error: bool = True) -> None:
        super().delete_document(doc_id, raise_error)
        self._engine.evict(doc_id)

    async def adelete_document(self, doc_id: str, raise_error: bool = True) -> None:
        await super().adelete_document(doc_id, raise_error)
        self._engine.evict(doc_id)

    def delete_ref_doc(self, ref_doc_id: str, raise_error: bool = True) -> None:
        super().delete_ref_doc(ref_doc_id, raise_error)
        self._engine.evict(ref_doc_id)

    async def adelete_ref_doc(self, ref_doc_id: str, raise_error: bool = True) -> None:
        await super().adelete_ref_doc(ref_doc_id, raise_error)
        self._engine.evict(ref_doc_id)
