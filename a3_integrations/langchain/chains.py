"""The stuff chain with boundaries: each document reaches the model as a chunk of its own."""

from __future__ import annotations

import uuid
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from a3_integrations.langchain.documents import Part, chunk_of, cut, joined, to_blocks


def create_a3_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = "\n\n",
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers over a list of documents, each served as a cached chunk.

    It has the signature of ``create_stuff_documents_chain`` and makes the same prompt, so that it
    takes its place, in ``create_retrieval_chain`` too. Documents that were never precomputed are
    stored by the first question that retrieves them.

    Parameters
    ----------
    llm : chat model
        A `ChatA3`, bound or not; other chat models read the same content blocks as documents.
    prompt : prompt template
        With a variable for the documents.
    output_parser : output parser or None
        Takes the answer's text from the message where None.
    document_prompt : prompt template or None
        How each document is shown; its ``page_content`` alone where None.
    document_separator : str
        What stands between documents.
    document_variable_name : str
        The prompt's variable, and the key of the list of documents in the input.

    Raises
    ------
    ValueError
        The prompt has no such variable.
    TypeError
        The model completes text.
    """
    if document_variable_name not in prompt.input_variables:
        raise ValueError(
            f"The prompt has no variable {document_variable_name!r} for the documents; it has "
            f"{', '.join(prompt.input_variables) or 'none'}."
        )
    if isinstance(llm, BaseLLM):
        raise TypeError("create_a3_documents_chain needs a chat model: use ChatA3.")
    shown = document_prompt or PromptTemplate.from_template("{page_content}")
    mark = f"a3documents{uuid.uuid4().hex}"

    def content(inputs: dict[str, Any]) -> list[Part]:
        parts: list[Part] = []
        for document in inputs[document_variable_name]:
            parts += [document_separator] * bool(parts) + _shown(document, shown)
        return joined(parts)

    def with_documents(inputs: dict[str, Any], config: RunnableConfig) -> list[BaseMessage]:
        value = prompt.invoke({**inputs, document_variable_name: mark}, config)
        return [_fill(m, mark, content(inputs)) for m in value.to_messages()]

    async def awith_documents(inputs: dict[str, Any], config: RunnableConfig) -> list[BaseMessage]:
        value = await prompt.ainvoke({**inputs, document_variable_name: mark}, config)
        return [_fill(m, mark, content(inputs)) for m in value.to_messages()]

    inputs = RunnableLambda(with_documents, awith_documents).with_config(run_name="format_inputs")
    return (inputs | llm | (output_parser or StrOutputParser())).with_config(
        run_name="a3_documents_chain"
    )


def _shown(document: Document, prompt: BasePromptTemplate[str]) -> list[Part]:
    """What the document prompt makes of a document; all of it is the chunk if it changes it."""
    text = format_document(document, prompt)
    parts = cut(text, [document])
    if document.page_content.strip() and not any(part == chunk_of(document) for part in parts):
        return cut(text, [document.model_copy(update={"page_content": text})])
    return parts


def _fill(message: BaseMessage, mark: str, documents: list[Part]) -> BaseMessage:
    """The message with the documents where the mark stands."""
    blocks: list[Any] = []
    given = message.content if isinstance(message.content, list) else [message.content]
    for block in given:
        text = block if isinstance(block, str) else block.get("text", "")
        if mark not in text:
            blocks.append(block)
            continue
        between: list[Part] = []
        for index, piece in enumerate(text.split(mark)):
            between += [*documents] * (index > 0) + [piece]
        blocks += to_blocks(joined(between))
    if blocks == given:
        return message
    return message.model_copy(update={"content": blocks})
