"""Computing the KV of documents while they are ingested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.runnables.config import run_in_executor

from a3_integrations.langchain.settings import A3Settings


class A3Precompute(BaseDocumentTransformer):
    """The last step after a text splitter: computes and stores each document's KV.

    The documents pass through unchanged. ``llm.precompute(documents)`` does the same in one call.

    Parameters
    ----------
    llm : ChatA3 or A3LLM
        Whose chunks these are.
    show_progress : bool
        Show a progress bar.
    """

    def __init__(self, llm: A3Settings, *, show_progress: bool = True) -> None:
        if not isinstance(llm, A3Settings):
            raise TypeError(f"A3Precompute needs a ChatA3 or A3LLM, not {type(llm).__name__}.")
        self.llm = llm
        self.show_progress = show_progress

    def transform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Compute and store, and return the same documents."""
        self.llm.precompute(documents, progress=self.show_progress)
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """The same for an event loop."""
        return await run_in_executor(None, self.transform_documents, documents, **kwargs)
