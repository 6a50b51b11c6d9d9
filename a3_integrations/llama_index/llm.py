"""The engine as a LlamaIndex LLM.

Input (LlamaIndex -> engine): ``chat`` turns ChatMessages into engine messages, ``complete`` turns a
prompt into one user message, or plans it as it stands when it is ``formatted``. The texts of known
chunks are found inside either, so stock query and chat engines are served from the cache.

Output (engine -> LlamaIndex): text, token counts in ``raw["usage"]`` where LlamaIndex's
TokenCountingHandler looks for them, and the FusionReport in ``raw["a3"]`` and ``last_report``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

from a3_engine import A3Engine, FusionReport
from a3_engine.chunks.codecs import DEFAULT_CODEC
from a3_engine.chunks.stand_in import AUTO
from a3_engine.decoding.compression import make_compression
from a3_engine.engine import PromptLike
from a3_engine.fusion.selectors import choose_selector, with_call
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.options import CALL_FIELDS, ENGINE_FIELDS
from a3_engine.shared import shared_engine
from a3_integrations.llama_index.responses import chat_response, completion_response, to_engine

# Names that callers of other LLMs use for our settings.
ALIASES = {"max_tokens": "max_new_tokens"}


# The report of what finished last in this thread or task, for who called the LLM from it.
finished: ContextVar[FusionReport | None] = ContextVar("finished", default=None)


class A3LLM(LLM):
    """A local model that answers from cached chunks.

    Examples
    --------
    >>> llm = A3LLM(model="smollm2-135m-instruct")
    >>> query_engine = index.as_query_engine(llm=llm, response_synthesizer=A3Synthesizer(llm=llm))

    A ready engine is taken too: ``A3LLM(engine=engine)``. It decides about model and store, so that
    no field about these may be given beside it.
    """

    model: str = Field(
        default=DEMO_MODEL, description="Hub id, local folder, GGUF file, or the demo model's name."
    )
    cache_dir: str | None = Field(
        default=None,
        description="Folder for chunks and unpacked models; the user's cache folder where None.",
    )
    device: str | None = Field(default=None, description="CUDA or MPS where there is one, if None.")
    dtype: str | None = Field(default=None, description="bfloat16, float16 or float32.")
    trust_remote_code: bool = Field(default=False, description="Run code from the repository.")
    quality: str | None = Field(
        default=None, description="fast, balanced or exact, in place of selector and ratio."
    )
    selector: str | None = Field(default=None, description="Fusion method; the engine's if None.")
    ratio: float | None = Field(default=None, ge=0, le=1, description="Recompute ratio.")
    compression: str | None = Field(
        default=None, description="What cuts the prompt's cache for decoding; the engine's if None."
    )
    keep: float | None = Field(default=None, gt=0, le=1, description="Share that it leaves.")
    encode_prefix: str = Field(
        default="template",
        description="What chunks are computed behind: template, bos, none, or a text.",
    )
    stand_in: str | tuple[str, ...] = Field(
        default=AUTO,
        description="What they are computed behind as well: auto, shipped, none, or passages of "
        "yours.",
    )
    size_limit: int | None = Field(
        default=None, gt=0, description="Bytes of the store; half of the free disk where None."
    )
    codec: str = Field(
        default=DEFAULT_CODEC, description="How chunks are stored: raw, int8 or int4."
    )
    max_new_tokens: int = Field(default=256, gt=0, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(default=None, gt=0, description="Sample among so many tokens.")
    repetition_penalty: float = Field(default=1.0, gt=0, description="1.0 is off.")
    stop: list[str] = Field(default_factory=list, description="Strings that end the answer.")
    logprobs: bool = Field(default=False, description="Report the tokens' log probabilities.")
    top_logprobs: int = Field(
        default=0, ge=0, description="With logprobs: the likeliest tokens in each place instead."
    )
    seed: int | None = Field(default=None, description="Of sampling; torch's own where None.")

    _engine: A3Engine = PrivateAttr()
    _last_report: FusionReport | None = PrivateAttr(default=None)

    def __init__(
        self, model: str | None = None, *, engine: A3Engine | None = None, **fields: Any
    ) -> None:
        if unknown := set(fields) - set(type(self).model_fields):
            raise TypeError(
                f"A3LLM has no field {', '.join(sorted(unknown))}; it has "
                f"{', '.join(type(self).model_fields)}."
            )
        # None is not given, as in other LLMs.
        fields = {
            n: value for n, value in fields.items() if value is not None or n not in CALL_FIELDS
        }
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        # What is unknown fails here.
        choose_selector(fields.get("selector"), fields.get("ratio"), fields.get("quality"))
        if fields.get("compression") is not None:
            make_compression(fields["compression"], fields.get("keep"))
        if engine is not None:
            decided = {name for name in ENGINE_FIELDS if name in fields}
            if decided or model not in (None, engine.name):
                names = ", ".join(sorted(decided | ({"model"} if model else set())))
                raise ValueError(
                    f"A3LLM was given an engine and {names}, which the engine decides: give one "
                    f"or the other. A3Engine.from_pretrained takes {names} too."
                )
            model = engine.name
        super().__init__(model=model or DEMO_MODEL, **fields)
        self._engine = engine or shared_engine(
            **{name: getattr(self, name) for name in ("model", *ENGINE_FIELDS)}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels with its engine, which refuses where it cannot be made anew."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        for of_process in ("callback_manager", "rate_limiter"):
            del settings[of_process]
        return _from_settings, (type(self), self._engine, settings)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> A3LLM:
        """A copy that shares the engine."""
        return super().__deepcopy__((memo or {}) | {id(self._engine): self._engine})

    @classmethod
    def class_name(cls) -> str:
        return "A3LLM"

    @property
    def engine(self) -> A3Engine:
        """The engine behind this LLM."""
        return self._engine

    @property
    def last_report(self) -> FusionReport | None:
        """Report of the request that finished last; a stream's is there when it was read.

        With several threads read ``raw["a3"]`` of the response instead.
        """
        return self._last_report

    @property
    def metadata(self) -> LLMMetadata:
        window, chats = self._engine.outline
        return LLMMetadata(
            context_window=window,
            num_output=self.max_new_tokens,
            is_chat_model=chats,
            model_name=self._engine.name,
        )

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        answer = self._engine.generate(self._from_messages(messages), **self._options(kwargs))
        return chat_response(answer.text, None, self._finish(answer.report))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        pieces = self._pieces(self._from_messages(messages), kwargs)
        return (chat_response(*piece) for piece in pieces)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._from_messages(messages)
        answer = await self._engine.agenerate(request, **self._options(kwargs))
        return chat_response(answer.text, None, self._finish(answer.report))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        pieces = self._apieces(self._from_messages(messages), kwargs)
        return (chat_response(*piece) async for piece in pieces)

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._from_prompt(prompt, formatted)
        answer = self._engine.generate(request, **self._options(kwargs))
        return completion_response(answer.text, None, self._finish(answer.report))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        pieces = self._pieces(self._from_prompt(prompt, formatted), kwargs)
        return (completion_response(*piece) for piece in pieces)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        request = self._from_prompt(prompt, formatted)
        answer = await self._engine.agenerate(request, **self._options(kwargs))
        return completion_response(answer.text, None, self._finish(answer.report))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        pieces = self._apieces(self._from_prompt(prompt, formatted), kwargs)
        return (completion_response(*piece) async for piece in pieces)

    # How

    def _from_messages(self, messages: Sequence[ChatMessage]) -> PromptLike:
        if self.messages_to_prompt not in (None, generic_prompt):
            return self._engine.runtime.planner.plan_raw(self.messages_to_prompt(messages))
        # An empty conversation, too, is the template's to show.
        return self._engine.runtime.planner.plan(
            [to_engine(message) for message in messages], blank=True
        )

    def _from_prompt(self, prompt: str, formatted: bool) -> PromptLike:
        if not formatted and self.completion_to_prompt is not None:
            own = self.completion_to_prompt(prompt)
            # The default leaves the prompt as it is; then the model's chat template is used.
            formatted, prompt = own != prompt, own
        return self._engine.runtime.planner.plan_raw(prompt) if formatted else prompt

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        if unknown := set(given) - set(CALL_FIELDS):
            raise TypeError(
                f"A3LLM takes no {', '.join(sorted(unknown))} for a call; "
                f"it takes {', '.join(CALL_FIELDS)}."
            )
        given = {name: value for name, value in given.items() if value is not None}
        options = with_call({name: getattr(self, name) for name in CALL_FIELDS}, given)
        n_top = options.pop("top_logprobs")
        options["logprobs"] = n_top if options["logprobs"] else None
        stop = options["stop"] or ()
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return options

    def _finish(self, report: FusionReport | None) -> FusionReport | None:
        self._last_report = report
        finished.set(report)
        return report

    def _pieces(self, request: PromptLike, kwargs: dict[str, Any]) -> Generator[Any, None, None]:
        """(text so far, new piece, None), and at the end (text, "", report)."""
        stream = self._engine.stream(request, **self._options(kwargs))

        def generate() -> Generator[Any, None, None]:
            text = ""
            with stream:
                for piece in stream:
                    text += piece
                    yield text, piece, None
            yield text, "", self._finish(stream.report)

        return generate()

    async def _apieces(
        self, request: PromptLike, kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        stream = await self._engine.astream(request, **self._options(kwargs))
        text = ""
        try:
            async for piece in stream:
                text += piece
                yield text, piece, None
        finally:
            stream.close()
        yield text, "", self._finish(stream.report)


def _from_settings(kind: type[A3LLM], engine: A3Engine, settings: dict[str, Any]) -> A3LLM:
    of_engine = {name: settings.pop(name) for name in ("model", *ENGINE_FIELDS)}
    llm = kind(engine=engine, **settings)
    for name, value in of_engine.items():
        setattr(llm, name, value)
    return llm
