"""The engine as a LangChain chat model.

Input (LangChain -> engine): messages become turns with chunks (`messages.py`), tools and schemas go
to the chat template and, where a call or JSON is asked for, into a grammar (`tools.py`).

Output (engine -> LangChain): text and tool calls, token counts in ``usage_metadata`` with what was
read from and added to the cache, and the FusionReport in ``response_metadata["a3"]``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import ensure_config, run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import Field

from a3_engine import FusionReport, Prompt
from a3_engine.decoding.sampling import strings
from a3_engine.model.loading import default_cache_dir, known_context_window
from a3_engine.tools import MARKS, CallReader, chosen, grammar, listed
from a3_integrations.langchain.messages import to_engine
from a3_integrations.langchain.settings import A3Settings, about, langchains_errors, usage
from a3_integrations.langchain.tools import (
    closing_chunk,
    to_form,
    to_json_schema,
    to_schema,
)


class Request(NamedTuple):
    """A planned prompt, the engine's options, and the reader of calls where there are tools."""

    prompt: Prompt
    options: dict[str, Any]
    reader: CallReader | None


class ChatA3(A3Settings, BaseChatModel):
    """A local chat model that answers from cached chunks.

    Examples
    --------
    >>> llm = ChatA3(model="smollm2-135m-instruct", max_tokens=64)
    >>> llm.precompute(documents)
    >>> chain = create_a3_documents_chain(llm, prompt)

    Nothing is loaded before the first request. Calls take ``max_tokens``, ``temperature``,
    ``top_p``, ``top_k``, ``repetition_penalty``, ``stop``, ``logprobs``, ``top_logprobs``,
    ``selector``, ``ratio``, ``compression`` and ``keep`` too.
    """

    streaming: bool = Field(default=False, description="Hand tokens to callbacks in invoke, too.")

    @property
    def _llm_type(self) -> str:
        return "a3-chat"

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        return self._identity(stop, kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="a3",
            ls_model_name=kwargs.get("model", self.model),
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if ends := strings("stop", self.stop if stop is None else stop):
            params["ls_stop"] = list(ends)
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        """What is true of every text model here, and the window if the model's files are here.

        LangChain calls this before the settings have made the engine.
        """
        given = self.engine
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()
        name, folder = (given.name, given.cache_dir) if given else (self.model, folder)
        profile = ModelProfile(
            name=name,
            text_inputs=True,
            image_inputs=False,
            image_url_inputs=False,
            pdf_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            image_tool_message=False,
            pdf_tool_message=False,
            text_outputs=True,
            image_outputs=False,
            audio_outputs=False,
            video_outputs=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            attachment=False,
            temperature=True,
        )
        if window := given.known_window if given else known_context_window(name, folder):
            profile["max_input_tokens"] = window
        return profile

    # Answers: everything is an aggregate of the two streams.

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs)
        with (
            langchains_errors(),
            self.engine.stream(request.prompt, **request.options) as stream,
        ):
            for piece in stream:
                if chunk := _chunk(request.reader, piece):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        assert stream.report is not None
        last = _last_chunk(request.reader, stream.report)
        if run_manager:
            run_manager.on_llm_new_token(last.text, chunk=last)
        yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = await run_in_executor(None, self._request, messages, stop, kwargs)
        stream = await self.engine.astream(request.prompt, **request.options)
        try:
            with langchains_errors():
                async for piece in stream:
                    if chunk := _chunk(request.reader, piece):
                        if run_manager:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
        finally:
            stream.close()
        assert stream.report is not None
        last = _last_chunk(request.reader, stream.report)
        if run_manager:
            await run_manager.on_llm_new_token(last.text, chunk=last)
        yield last

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, **kwargs))

    # Tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Parameters
        ----------
        tools
            Functions, pydantic classes, LangChain tools or OpenAI's schemas.
        tool_choice
            None or ``"auto"``: the model decides. ``"any"``, ``"required"`` or True: it must call
            one. A tool's name: it must call that one. A forced call always fits its schema.
        strict, parallel_tool_calls
            Taken for the sake of callers that give them; a forced call is strict and a single one.

        Raises
        ------
        ValueError
            ``tool_choice`` names no tool.
        """
        schemas = [to_schema(tool) for tool in listed(tools)]
        chosen(schemas, tool_choice)
        return super().bind(tools=schemas, tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: str = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as objects of a schema.

        Parameters
        ----------
        schema : pydantic class, TypedDict, or JSON schema
            May be None with ``method="json_mode"``.
        method : str
            ``"function_calling"`` shows the schema to the model as a tool and forces the call.
            ``"json_schema"`` leaves the prompt alone and forces JSON that fits the schema.
            ``"json_mode"`` forces a JSON object, whose fields the prompt has to name.
        include_raw : bool
            Answer with ``{"raw", "parsed", "parsing_error"}`` in place of raising on bad output.
        strict
            Taken for the sake of callers that give it; the first two methods always are.
        """
        if method not in ("function_calling", "json_schema", "json_mode"):
            raise ValueError(
                f"There is no method {method!r}: use function_calling, json_schema or json_mode."
            )
        if method == "function_calling" and schema is not None:
            return super().with_structured_output(schema, include_raw=include_raw)
        if schema is None and method != "json_mode":
            raise ValueError(f"method={method!r} needs a schema.")
        form = "json" if method == "json_mode" else to_json_schema(schema)
        llm = self.bind(
            format=form,
            ls_structured_output_format={
                "kwargs": {"method": method},
                "schema": schema or {"type": "object"},
            },
        )
        parser: Any = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(
            parsed=lambda answer: parser.invoke(answer["raw"]), parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of the whole prompt that these messages make, template included."""
        schemas = [to_schema(tool) for tool in tools or ()]
        if not messages:
            return 0
        return self.engine.runtime.planner.plan(
            to_engine(messages), tools=schemas, blank=True
        ).n_tokens

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Request:
        kwargs = dict(kwargs)
        choice, form = kwargs.pop("tool_choice", None), kwargs.pop("format", None)
        if (response_format := kwargs.pop("response_format", None)) is not None:
            form = to_form(response_format)
        tools = listed(kwargs.pop("tools", None))
        tools = [] if choice == "none" else [to_schema(tool) for tool in tools]
        options = self._options(stop, kwargs)
        options["grammar"] = grammar(tools, choice, form)
        options["shown"] = MARKS if tools else ()
        prompt = self.engine.runtime.planner.plan(
            to_engine(messages),
            tools=tools,
            blank=True,
            conversation=options.pop("conversation") or of_thread(),
        )
        names = [tool["function"]["name"] for tool in tools]
        return Request(prompt, options, CallReader(names) if tools else None)


def of_thread() -> str | None:
    """The conversation that LangGraph, or a history of messages, runs this call in."""
    given = ensure_config().get("configurable", {})
    names = (given.get(name) for name in ("thread_id", "session_id"))
    return next((str(name) for name in names if name is not None), None)


def _chunk(reader: CallReader | None, piece: str) -> ChatGenerationChunk | None:
    text = reader.put(piece) if reader else piece
    return ChatGenerationChunk(message=AIMessageChunk(content=text)) if text else None


def _last_chunk(reader: CallReader | None, report: FusionReport) -> ChatGenerationChunk:
    message = closing_chunk(reader, usage_metadata=usage(report), response_metadata=about(report))
    if message.tool_calls:
        message.response_metadata["finish_reason"] = "tool_calls"
    return ChatGenerationChunk(message=message)
