"""Answers over nodes, with each node kept as one chunk.

LlamaIndex joins the nodes' texts into one prompt. This synthesizer makes the engine remember them
first, so that it finds each node again inside the prompt and serves it from the cache; nodes not
precomputed are computed with the first question that retrieves them. Everything else, such as
streaming, async, structured output and refining over groups, is LlamaIndex's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from llama_index.core import PromptHelper, Settings
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.llms import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.prompt_utils import get_biggest_prompt
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType

from a3_engine import Chunk, Message
from a3_integrations.llama_index.llm import A3LLM, finished

SEPARATOR = "\n\n"  # as CompactAndRefine joins nodes


class A3Synthesizer(CompactAndRefine):
    """`CompactAndRefine` that never cuts through a node that fits into the context window.

    Parameters
    ----------
    llm : A3LLM or None
        ``Settings.llm`` where None.
    **options
        Those of `CompactAndRefine`: ``streaming``, ``text_qa_template``, ``refine_template``, ...

    Raises
    ------
    TypeError
        The LLM is no `A3LLM`.

    Notes
    -----
    ``response.metadata["a3"]`` holds the report of the last request that the response took, as
    plain values; a streamed one has it in ``llm.last_report`` when it was read.
    """

    def __init__(self, llm: LLM | None = None, **options: Any) -> None:
        if llm is None and Settings._llm is None:
            raise TypeError(
                "A3Synthesizer needs an A3LLM: pass llm=A3LLM(...) or set Settings.llm."
            )
        llm = llm or Settings.llm
        own = llm.llm if isinstance(llm, StructuredLLM) else llm
        if not isinstance(own, A3LLM):
            raise TypeError(
                f"A3Synthesizer needs an A3LLM, not {type(own).__name__}; "
                "pass llm=A3LLM(...) or set Settings.llm."
            )
        self._engine = own.engine
        if options.get("prompt_helper") is None:
            # Counts tokens as the model does; the default counts by another tokenizer.
            options["prompt_helper"] = PromptHelper.from_llm_metadata(
                own.metadata, tokenizer=own.engine.runtime.planner.tokenize_text
            )
        if options.get("callback_manager") is None and not own.callback_manager.handlers:
            # Stock query engines hand theirs on; token counters and tracers listen there.
            options["callback_manager"] = Settings.callback_manager
        super().__init__(llm=llm, **options)

    def synthesize(
        self, query: QueryType, nodes: list[NodeWithScore], *args: Any, **kwargs: Any
    ) -> RESPONSE_TYPE:
        self._remember(nodes)
        finished.set(None)
        return _with_report(super().synthesize(query, nodes, *args, **kwargs))

    async def asynthesize(
        self, query: QueryType, nodes: list[NodeWithScore], *args: Any, **kwargs: Any
    ) -> RESPONSE_TYPE:
        await asyncio.to_thread(self._remember, nodes)
        finished.set(None)
        return _with_report(await super().asynthesize(query, nodes, *args, **kwargs))

    def _remember(self, nodes: Iterable[NodeWithScore]) -> None:
        self._engine.remember(
            Chunk(scored.node.get_content(MetadataMode.LLM), scored.node.ref_doc_id)
            for scored in nodes
        )

    def _make_compact_text_chunks(self, query_str: str, text_chunks: Sequence[str]) -> list[str]:
        """Group whole nodes, as many as fit into one prompt."""
        prompts = [
            template.partial_format(query_str=query_str)
            for template in (self._text_qa_template, self._refine_template)
        ]
        prompt = get_biggest_prompt(prompts)
        texts = [text for text in (text.strip() for text in text_chunks) if text]
        groups = self._grouped(prompt, texts, self._response_padding_size)
        if len(groups) > 1:
            # A later part's prompt holds the answer so far too, and the chat template's own tokens.
            template = self._engine.plan([Message("user", "x")]).n_tokens
            answer = max(self._response_padding_size, self._llm.metadata.num_output)
            with suppress(ValueError):  # a window too small for that; the former parts may do
                groups = self._grouped(prompt, texts, answer + template)
        return [SEPARATOR.join(group) for group in groups]

    def _grouped(
        self, prompt: BasePromptTemplate, texts: Sequence[str], padding: int
    ) -> list[list[str]]:
        splitter = self._prompt_helper.get_text_splitter_given_prompt(
            prompt, padding=padding, llm=self._llm
        )
        count = self._engine.runtime.planner.tokenize_text
        between = len(count(SEPARATOR))
        groups: list[list[str]] = []
        room = 0
        for text in texts:
            for piece in splitter.split_text(text):
                needed = len(count(piece)) + between
                if not groups or needed > room:
                    groups.append([])
                    room = splitter.chunk_size + between
                groups[-1].append(piece)
                room -= needed
        return groups


def _with_report(response: RESPONSE_TYPE) -> RESPONSE_TYPE:
    if (report := finished.get()) is not None:
        response.metadata = {**(response.metadata or {}), "a3": report.to_dict()}
    return response
