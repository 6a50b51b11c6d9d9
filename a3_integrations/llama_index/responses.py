"""LlamaIndex's messages as text, and the engine's answers as LlamaIndex's responses."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
)

from a3_engine import FusionReport


def text_of(message: ChatMessage) -> str:
    """What a message says; `ValueError` where a block of it is no text."""
    texts = []
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise ValueError(
                f"A3LLM reads text; a {block.block_type!r} block has none. Turn it into text first."
            )
        texts.append(block.text)
    return "\n".join(texts)


def _raw(report: FusionReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    usage = {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.generated_tokens,
        "total_tokens": report.prompt_tokens + report.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
    }
    return {"usage": usage, "a3": report.to_dict()}


def chat_response(text: str, delta: str | None, report: FusionReport | None) -> ChatResponse:
    """The answer so far, the piece that came last, and at the end what happened."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=_raw(report), logprobs=_logprobs(report))


def completion_response(
    text: str, delta: str | None, report: FusionReport | None
) -> CompletionResponse:
    """The same for a completion."""
    return CompletionResponse(text=text, delta=delta, raw=_raw(report), logprobs=_logprobs(report))


def _logprobs(report: FusionReport | None) -> list[list[LogProb]] | None:
    """For each token the likeliest ones in its place, or it alone where none were asked for."""
    if report is None or report.logprobs is None:
        return None
    return [
        [
            LogProb(token=token, logprob=logprob, bytes=list(token.encode()))
            for token, logprob in entry.top or [(entry.token, entry.logprob)]
        ]
        for entry in report.logprobs
    ]
