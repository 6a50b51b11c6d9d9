"""Where a document begins and ends, in content blocks and in text.

The canonical carrier is LangChain's ``text-plain`` content block: each is one chunk. A document's
chunk is its ``page_content``; what a document prompt puts around it is ordinary text, so that the
same chunk serves every prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document

from a3_engine import Chunk
from a3_engine.blocks import name_of, said

Part = str | Chunk


def tag_of(document: Document) -> str | None:
    """What a document's chunk is evicted by: its id, or else its source."""
    tag = document.id or document.metadata.get("source")
    return None if tag is None else str(tag)


def chunk_of(document: Document) -> Chunk:
    """The chunk of a document."""
    if not isinstance(document, Document):
        raise TypeError(
            f"Give a list of Documents, such as Document(page_content=text), not "
            f"{type(document).__name__}."
        )
    return Chunk(document.page_content.strip(), tag_of(document))


def cut(text: str, documents: Iterable[Document]) -> list[Part]:
    """Cut text at the documents that stand in it, in their order; others leave it as it is."""
    parts: list[Part] = []
    at = 0
    for document in documents:
        chunk = chunk_of(document)
        start = text.find(chunk.text, at) if chunk.text else -1
        if start >= 0:
            parts += [text[at:start], chunk]
            at = start + len(chunk.text)
    return joined([*parts, text[at:]])


def joined(parts: Iterable[Part]) -> list[Part]:
    """Without empty texts, and neighbouring texts as one: they are tokenized as one string."""
    whole: list[Part] = []
    for part in parts:
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        elif part != "":
            whole.append(part)
    return whole


def to_blocks(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Content blocks that stand for exactly these parts, with nothing between them."""
    blocks: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            blocks.append({"type": "text", "text": part})
        else:
            block = {"type": "text-plain", "mime_type": "text/plain", "text": part.text}
            tag = {} if part.tag is None else {"id": part.tag}
            blocks.append({**block, **tag, "extras": {"verbatim": True}})
    return blocks


def from_blocks(blocks: Iterable[str | dict[str, Any]]) -> list[Part]:
    """Texts and chunks of a message's content blocks.

    A ``text-plain`` block stands by itself: where what is next to it has no white space there, an
    empty line goes between, unless its ``extras`` say ``verbatim``.

    Raises
    ------
    ValueError
        A block holds something else than text.
    """
    parts: list[Part] = []
    apart = False  # the part before wants to stand by itself
    for block in blocks:
        part, alone = _part(block)
        if part == "":
            continue
        ends_open = bool(parts) and not (isinstance(parts[-1], str) and parts[-1][-1].isspace())
        begins_open = not (isinstance(part, str) and part[0].isspace())
        if (apart or alone) and ends_open and begins_open:
            parts.append("\n\n")
        parts.append(part)
        apart = alone
    return joined(parts)


def _part(block: str | dict[str, Any]) -> tuple[Part, bool]:
    """A block's text or chunk, and whether it has to stand by itself."""
    if isinstance(block, str):
        return block, False
    if block.get("type") == "text-plain" and isinstance(block.get("text"), str):
        extras, text = block.get("extras"), block["text"].strip()
        verbatim = isinstance(extras, Mapping) and extras.get("verbatim", False)
        return (Chunk(text, name_of(block)) if text else ""), not verbatim
    part = said(block)
    return part, isinstance(part, Chunk)
