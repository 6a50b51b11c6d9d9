"""Computing the KV of nodes while they are ingested."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from a3_engine import A3Engine, Chunk
from a3_integrations.llama_index.llm import A3LLM


class A3PrecomputeTransform(TransformComponent):
    """The last step of an `IngestionPipeline`: computes and stores each node's KV.

    The nodes pass through unchanged. A node's chunk is tagged with its ``ref_doc_id``, so that
    ``llm.engine.evict(doc_id)`` removes a document's chunks.

    Parameters
    ----------
    llm : A3LLM or A3Engine
        Whose chunks these are. With ``num_workers`` > 1 it has to be built by the model's name.
    show_progress : bool
        Show a progress bar.
    """

    fingerprint: str = Field(
        description="Identity of the model; another model makes ingestion caches compute anew."
    )
    show_progress: bool = Field(default=True, description="Show a progress bar.")

    _engine: A3Engine = PrivateAttr()

    def __init__(self, llm: A3LLM | A3Engine, show_progress: bool = True, **_: Any) -> None:
        engine = llm.engine if isinstance(llm, A3LLM) else llm
        if not isinstance(engine, A3Engine):
            raise TypeError(f"A3PrecomputeTransform needs an A3LLM, not {type(llm).__name__}.")
        super().__init__(fingerprint=engine.fingerprint, show_progress=show_progress)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        return "A3PrecomputeTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a pipeline's cache goes by: it skips the step while all that it stored is there."""
        return {**super().to_dict(**kwargs), "store": self._engine.runtime.store.local.state()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._engine, self.show_progress)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        chunks = [Chunk(node.get_content(MetadataMode.LLM), node.ref_doc_id) for node in nodes]
        self._engine.precompute(chunks, progress=self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self, nodes, **kwargs)
