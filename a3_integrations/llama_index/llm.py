"""The engine as a LlamaIndex LLM.

Input (LlamaIndex -> engine): ``chat`` turns ChatMessages into engine messages, ``complete`` turns a
prompt into one user message, or plans it as it stands when it is ``formatted``. The texts of known
chunks are found inside either, so stock query and chat engines are served from the cache. Tools go
to the chat template and, where a call is asked for, into a grammar (`tools.py`).

Output (engine -> LlamaIndex): text and tool calls, token counts in ``raw["usage"]`` where
LlamaIndex's TokenCountingHandler looks for them, and the FusionReport in ``raw["a3"]`` and
``last_report``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

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

from a3_engine import A3Engine, FusionReport
from a3_engine.chunks.codecs import CODEC_NAMES, DEFAULT_CODEC
from a3_engine.chunks.stand_in import AUTO
from a3_engine.decoding.compression import make_compression
from a3_engine.engine import PromptLike
from a3_engine.fusion.selectors import choose_selector, with_call
from a3_engine.messages import ToolCall
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.options import CALL_FIELDS, ENGINE_FIELDS, in_engines_words
from a3_engine.shared import shared_engine
from a3_engine.tools import MARKS, Tool, grammar, in_full, listed
from a3_engine.turns import DAY_S
from a3_integrations.llama_index.responses import (
    chat_response,
    completion_response,
    to_conversation,
)
from a3_integrations.llama_index.tools import Answer, CallsTools

# Names that callers of other LLMs use for our settings.
ALIASES = {"max_tokens": "max_new_tokens"}


# The report of what finished last in this thread or task, for who called the LLM from it.
finished: ContextVar[FusionReport | None] = ContextVar("finished", default=None)


class Question(NamedTuple):
    """A prompt, the engine's options for it, and what reads its answer."""

    prompt: PromptLike
    options: dict[str, Any]
    answer: Answer


class Piece(NamedTuple):
    """The text so far, and what is new of it; with the last piece the report and the calls."""

    text: str
    delta: str | None
    report: FusionReport | None = None
    calls: Sequence[ToolCall] = ()


class A3LLM(CallsTools):
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
        description="What chunks are computed after: template, bos, none, or a text.",
    )
    stand_in: str | tuple[str, ...] = Field(
        default=AUTO,
        description="What they are computed after as well: auto, shipped, none, or passages of "
        "yours.",
    )
    size_limit: int | None = Field(
        default=None, gt=0, description="Bytes of the store; half of the free disk where None."
    )
    codec: str = Field(
        default=DEFAULT_CODEC, description=f"How chunks are stored: {', '.join(CODEC_NAMES)}."
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
    conversation: str | None = Field(
        default=None, description="Whose turns a chat's messages are; what was said, where None."
    )
    turns_kept_s: float = Field(
        default=DAY_S, ge=0, description="Seconds that finished turns are kept; 0 keeps none."
    )

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
            is_function_calling_model=self._by_template,
            model_name=self._engine.name,
        )

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return chat_response(*self._answered(self._asked(messages, kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return (chat_response(*piece) for piece in self._pieces(self._asked(messages, kwargs)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return chat_response(*await self._aanswered(self._asked(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        pieces = self._apieces(self._asked(messages, kwargs))
        return (chat_response(*piece) async for piece in pieces)

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        question = self._from_prompt(prompt, formatted, kwargs)
        return completion_response(*self._answered(question)[:3])

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        pieces = self._pieces(self._from_prompt(prompt, formatted, kwargs))
        return (completion_response(*piece[:3]) for piece in pieces)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        answered = await self._aanswered(self._from_prompt(prompt, formatted, kwargs))
        return completion_response(*answered[:3])

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        pieces = self._apieces(self._from_prompt(prompt, formatted, kwargs))
        return (completion_response(*piece[:3]) async for piece in pieces)

    # How

    @property
    def _by_template(self) -> bool:
        """Whether the model's chat template writes the prompt, and no function of the user's."""
        return self.messages_to_prompt in (None, generic_prompt)

    def _asked(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Question:
        kwargs = dict(kwargs)
        tools = [in_full(tool) for tool in listed(kwargs.pop("tools", None))]
        choice = kwargs.pop("tool_choice", None)
        parallel = kwargs.pop("allow_parallel_tool_calls", True)
        if choice == "none":
            tools = []
        options = self._options(kwargs)
        options["grammar"] = grammar(tools, choice, None)
        options["shown"] = MARKS if tools else ()
        prompt = self._from_messages(messages, tools, options.pop("conversation"))
        return Question(prompt, options, Answer(tools, parallel))

    def _from_messages(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        conversation: str | None = None,
    ) -> PromptLike:
        if self._by_template:
            # An empty conversation, too, is the template's to show.
            return self._engine.runtime.planner.plan(
                to_conversation(messages), tools=tools, blank=True, conversation=conversation
            )
        if tools:
            raise ValueError(
                "messages_to_prompt writes the prompt and shows no tools: leave it out, so that "
                "the model's chat template does."
            )
        return self._engine.runtime.planner.plan_raw(self.messages_to_prompt(messages))

    def _from_prompt(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> Question:
        options = self._options(kwargs)
        if not formatted and self.completion_to_prompt is not None:
            own = self.completion_to_prompt(prompt)
            # The default leaves the prompt as it is; then the model's chat template is used.
            formatted, prompt = own is not prompt and own != prompt, own
        options.pop("conversation")  # a prompt to complete has no turns
        request = self._engine.runtime.planner.plan_raw(prompt) if formatted else prompt
        return Question(request, options, Answer())

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        if unknown := set(given) - set(CALL_FIELDS):
            raise TypeError(
                f"A3LLM takes no {', '.join(sorted(unknown))} for a call; "
                f"it takes {', '.join(CALL_FIELDS)}."
            )
        given = {name: value for name, value in given.items() if value is not None}
        return in_engines_words(
            with_call({name: getattr(self, name) for name in CALL_FIELDS}, given)
        )

    def _finish(self, report: FusionReport | None) -> FusionReport | None:
        self._last_report = report
        finished.set(report)
        return report

    def _answered(self, question: Question) -> Piece:
        given = self._engine.generate(question.prompt, **question.options)
        question.answer.put(given.text)
        return self._last(question.answer, given.report)._replace(delta=None)

    async def _aanswered(self, question: Question) -> Piece:
        given = await self._engine.agenerate(question.prompt, **question.options)
        question.answer.put(given.text)
        return self._last(question.answer, given.report)._replace(delta=None)

    def _pieces(self, question: Question) -> Generator[Piece, None, None]:
        """The text as it comes, and at the end the report and the calls."""
        stream, answer = self._engine.stream(question.prompt, **question.options), question.answer

        def generate() -> Generator[Piece, None, None]:
            with stream:
                for piece in stream:
                    if shown := answer.put(piece):
                        yield Piece(answer.text, shown)
            yield self._last(answer, stream.report)

        return generate()

    async def _apieces(self, question: Question) -> AsyncGenerator[Piece, None]:
        stream, answer = (
            await self._engine.astream(question.prompt, **question.options),
            question.answer,
        )
        try:
            async for piece in stream:
                if shown := answer.put(piece):
                    yield Piece(answer.text, shown)
        finally:
            stream.close()
        yield self._last(answer, stream.report)

    def _last(self, answer: Answer, report: FusionReport | None) -> Piece:
        rest = answer.end()
        return Piece(answer.text, rest, self._finish(report), answer.calls)


def _from_settings(kind: type[A3LLM], engine: A3Engine, settings: dict[str, Any]) -> A3LLM:
    of_engine = {name: settings.pop(name) for name in ("model", *ENGINE_FIELDS)}
    llm = kind(engine=engine, **settings)
    for name, value in of_engine.items():
        setattr(llm, name, value)
    return llm
