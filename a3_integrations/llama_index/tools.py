"""LlamaIndex's tools in the engine's words, and the calls in the engine's answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.core.types import PydanticProgramMode

from a3_engine.messages import ToolCall
from a3_engine.tools import CallReader, Tool, in_full, new_call_id

BY_CALLS = (PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION)


def to_schema(tool: BaseTool) -> Tool:
    """A tool as a function schema without references, under the name by which it is called."""
    function = {
        "name": tool.metadata.get_name(),
        "description": tool.metadata.description,
        "parameters": tool.metadata.get_parameters_dict(),
    }
    return in_full({"type": "function", "function": function})


class Answer:
    """An answer while it comes: its text so far, and at its end the calls in it.

    Parameters
    ----------
    tools : sequence of dict
        Schemas of what may be called. Without any, all of an answer is text.
    parallel : bool
        Whether more than the first call counts.
    """

    def __init__(self, tools: Sequence[Tool] = (), parallel: bool = True) -> None:
        names = [tool["function"]["name"] for tool in tools]
        self._reader = CallReader(names) if names else None
        self._parallel = parallel
        self.text = ""
        self.calls: list[ToolCall] = []

    def put(self, piece: str) -> str:
        """Take a piece of the answer; returns the text that is certain now."""
        shown = self._reader.put(piece) if self._reader else piece
        self.text += shown
        return shown

    def end(self) -> str:
        """Read the calls; returns the rest of the text, with what only looks like a call."""
        if self._reader is None:
            return ""
        rest, calls, malformed = self._reader.end()
        rest += "\n".join(bad.text for bad in malformed)
        self.text += rest
        calls = calls if self._parallel else calls[:1]
        self.calls = [replace(call, id=new_call_id()) for call in calls]
        return rest


class CallsTools(FunctionCallingLLM):
    """What LlamaIndex asks of a model that calls tools, beside its answers."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `chat` and its twins take for a question with tools.

        ``tool_choice`` is ``"auto"``, ``"none"``, ``"any"`` or ``"required"``, or a tool's name;
        ``tool_required`` is the third where none is given.
        """
        messages = list(chat_history or [])
        if user_msg is not None:
            if isinstance(user_msg, str):
                user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
            messages.append(user_msg)
        return {
            "messages": messages,
            "tools": [to_schema(tool) for tool in tools],
            "tool_choice": tool_choice or ("required" if tool_required else None),
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer; `ValueError` where there are none and some are expected."""
        calls = [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs=block.tool_kwargs if isinstance(block.tool_kwargs, dict) else {},
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        if not calls and error_on_no_tool_call:
            raise ValueError(
                f"The answer holds no whole tool call: {response.message.content!r}. A call that "
                "is forced (tool_required=True) and has room (max_new_tokens) is always whole."
            )
        return calls

    # LlamaIndex forces the call of a structured answer, but forgets to where it streams.

    def _structured_stream_call(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        return self._program(output_cls, prompt).stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        program = self._program(output_cls, prompt)
        return await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _program(self, output_cls: type[Any], prompt: PromptTemplate) -> Any:
        mode = self.pydantic_program_mode
        calls = self.metadata.is_function_calling_model and mode in BY_CALLS
        forced = {"tool_choice": "required"} if calls else {}
        return get_program_for_llm(output_cls, prompt, self, mode, **forced)
