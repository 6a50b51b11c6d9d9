"""Content blocks of messages, of whatever provider: what of them a text model can be shown.

A history may have been written by another model, which a fallback or a switch left behind. Text is
kept, and so is JSON and a document of text; what belongs to the other model alone (its thinking,
its marks, its own tools' traces) is left out; what only a picture, a sound or a file says is
refused, since an answer without it would be about something else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from a3_engine.messages import Chunk

SEEN_OR_HEARD = ("image", "audio", "video", "media", "file", "pdf", "document", "text-plain")


def said(block: Mapping[str, Any]) -> str | Chunk:
    """What a block says: text, a document's chunk, or nothing.

    Raises
    ------
    ValueError
        It is a picture, a sound or a file without text.
    """
    kind = block.get("type")
    kind = kind if isinstance(kind, str) else ""
    for key in ("text", "refusal"):
        if isinstance(block.get(key), str) and "thinking" not in kind and "reasoning" not in kind:
            return block[key]
    if kind == "non_standard" and isinstance(block.get("value"), Mapping):
        return said(block["value"])
    if kind == "json" or "json" in block:
        return json.dumps(block.get("json"), ensure_ascii=False, default=str)
    source = block.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        text = str(source.get("data", "")).strip()
        return Chunk(text, name_of(block)) if text else ""
    if kind == "search_result" and isinstance(block.get("content"), list):
        inner = [part for part in block["content"] if isinstance(part, Mapping)]
        return "\n".join(part["text"] for part in inner if isinstance(part.get("text"), str))
    if any(word in kind for word in SEEN_OR_HEARD) and not kind.startswith(OF_OTHERS):
        if text_of := _decoded(block):
            return Chunk(text_of, name_of(block))
        raise ValueError(
            f"This model reads text; a {kind!r} block has none. Load its text and pass it as "
            '{"type": "text-plain", "mime_type": "text/plain", "text": ...}.'
        )
    return ""


OF_OTHERS = ("server_tool", "web_search", "file_search", "image_generation", "code_", "mcp_")


def name_of(block: Mapping[str, Any]) -> str | None:
    """What a document's block is evicted by."""
    name = block.get("id")
    return name if isinstance(name, str) else None


def _decoded(block: Mapping[str, Any]) -> str:
    """The text of a file that is a text's and came with its bytes."""
    mime = str(block.get("mime_type") or block.get("media_type") or "")
    data = block.get("base64") or block.get("data")
    if not mime.startswith("text/") or not isinstance(data, str | bytes):
        return ""
    try:
        return base64.b64decode(data, validate=True).decode().strip()
    except ValueError:
        return ""
