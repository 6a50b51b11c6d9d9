"""The settings that ChatA3 and A3LLM share, and the engine that they make."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core import exceptions as langchain_exceptions
from langchain_core.documents import Document
from langchain_core.runnables.config import run_in_executor
from pydantic import BaseModel, ConfigDict, Field, model_validator

from a3_engine import A3Engine, FusionReport, Precomputed, __version__
from a3_engine.chunks.codecs import CODEC_NAMES, DEFAULT_CODEC
from a3_engine.chunks.stand_in import AUTO
from a3_engine.decoding.compression import make_compression
from a3_engine.errors import ContextOverflowError
from a3_engine.fusion.selectors import choose_selector, with_call
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.options import CALL_FIELDS, ENGINE_FIELDS, in_engines_words
from a3_engine.report import TokenLogprob
from a3_engine.shared import is_shared, shared_engine
from a3_engine.turns import DAY_S
from a3_integrations.langchain.documents import chunk_of

logger = logging.getLogger(__name__)

# What decides about model and store; the other settings are the request's.
OF_ENGINE = ("model", *ENGINE_FIELDS)
PER_CALL = tuple("max_tokens" if name == "max_new_tokens" else name for name in CALL_FIELDS)
ALIASES = {"max_new_tokens": "max_tokens", "model_name": "model", "stop_sequences": "stop"}
# Settings of hosted models that chains and tests pass to any model.
HOSTED = {"api_key", "base_url", "max_retries", "timeout", "stream_usage"}


class A3ContextOverflowError(ContextOverflowError, langchain_exceptions.ContextOverflowError):
    """The engine's error, and LangChain's: middleware that shortens histories goes by that."""


@contextmanager
def langchains_errors() -> Iterator[None]:
    """The engine's errors as those that LangChain's own parts look for."""
    try:
        yield
    except A3ContextOverflowError:
        raise
    except ContextOverflowError as error:
        raise A3ContextOverflowError(str(error)) from error


class A3Settings(BaseModel):
    """Settings of a local model that answers from cached chunks.

    Objects with the same settings of model and store share one engine, so that the weights are in
    memory once. A ready engine is taken too: ``ChatA3(engine=engine)``. It then decides about model
    and store, and settings that say otherwise are an error.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

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
    quality: str | None = Field(
        default=None, description="fast, balanced or exact, in place of selector and ratio."
    )
    selector: str | None = Field(default=None, description="Fusion method; the engine's if None.")
    ratio: float | None = Field(default=None, ge=0, le=1, description="Recompute ratio.")
    compression: str | None = Field(
        default=None, description="What cuts the prompt's cache for decoding; the engine's if None."
    )
    keep: float | None = Field(default=None, gt=0, le=1, description="Share that it leaves.")
    max_tokens: int = Field(default=256, gt=0, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(default=None, gt=0, description="Sample among so many tokens.")
    repetition_penalty: float = Field(default=1.0, gt=0, description="1.0 is off.")
    stop: list[str] | None = Field(default=None, description="Strings that end the answer.")
    logprobs: bool = Field(default=False, description="Report the tokens' log probabilities.")
    top_logprobs: int = Field(
        default=0, ge=0, description="With logprobs: the likeliest tokens in each place, too."
    )
    seed: int | None = Field(default=None, description="Of sampling; torch's own where None.")
    conversation: str | None = Field(
        default=None,
        description="Whose turns a chat's messages are; LangGraph's thread_id or a history's "
        "session_id where None, and without these what was said.",
    )
    turns_kept_s: float = Field(
        default=DAY_S, ge=0, description="Seconds that finished turns are kept; 0 keeps none."
    )
    engine: A3Engine = Field(
        default=None,  # type: ignore[assignment]
        exclude=True,
        repr=False,
        description="The engine; made where not given.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a3_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {ALIASES.get(name, name): value for name, value in values.items()}
        # None is not given, as in other models.
        values = {
            name: value
            for name, value in values.items()
            if value is not None or name not in PER_CALL
        }
        if isinstance(values.get("stop"), str):
            values["stop"] = [values["stop"]]
        if useless := sorted(set(values) & HOSTED):
            logger.warning(
                "%s answers in this process, and has no use for %s.",
                cls.__name__,
                ", ".join(useless),
            )
        if unknown := set(values) - set(cls.model_fields) - HOSTED:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(sorted(unknown))}; "
                f"it has {', '.join(sorted((*OF_ENGINE, *PER_CALL, 'engine')))}."
            )
        return values

    @model_validator(mode="after")
    def _a3_engine(self) -> Any:
        choose_selector(self.selector, self.ratio, self.quality)  # an unknown one fails here
        if self.compression is not None:
            make_compression(self.compression, self.keep)
        given = self.engine
        if given is None or is_shared(given, **self._recipe()):
            self.engine = self._shared()
            return self
        fields = type(self).model_fields
        own = {"model": given.name, "cache_dir": str(given.cache_dir)}
        contradicting = [
            name
            for name in OF_ENGINE
            if getattr(self, name) not in (fields[name].default, own.get(name))
        ]
        if contradicting:
            raise ValueError(
                f"engine= decides about model and store already: leave out "
                f"{', '.join(contradicting)}, or give them to A3Engine.from_pretrained."
            )
        self.model = given.name
        return self

    @model_validator(mode="after")
    def _a3_version(self) -> Any:
        self._add_version("a3-integrations", __version__)  # type: ignore[attr-defined]
        return self

    def precompute(self, documents: Iterable[Document], *, progress: bool = True) -> Precomputed:
        """Compute and store the KV of each document's ``page_content``, where it is not yet stored.

        A chunk is tagged with the document's id, or else with ``metadata["source"]``:
        ``llm.engine.evict(tag)`` removes it.

        Raises
        ------
        ContextOverflowError
            A document does not fit into the context window; split it. Nothing was computed.
        """
        return self.engine.precompute([chunk_of(d) for d in documents], progress=progress)

    async def aprecompute(
        self, documents: Iterable[Document], *, progress: bool = True
    ) -> Precomputed:
        """:meth:`precompute` for an event loop."""
        return await run_in_executor(None, self.precompute, documents, progress=progress)

    @property
    def last_report(self) -> FusionReport | None:
        """The report of the engine's last request; each response has its own in its metadata."""
        return self.engine.last_report

    def get_token_ids(self, text: str) -> list[int]:
        """Ids by the model's own tokenizer; control tokens are only characters."""
        return list(self.engine.runtime.planner.tokenize_text(text))

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    def to_json(self) -> Any:
        if is_shared(self.engine, **self._recipe()):
            return super().to_json()  # type: ignore[misc]
        return self.to_json_not_implemented()  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[Any, Any]:
        """Settings travel; an engine made from them is made, or found, anew."""
        state = super().__getstate__()
        if is_shared(self.engine, **self._recipe()):
            state["__dict__"] = state["__dict__"] | {"engine": None}
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        if self.engine is None:
            self.engine = self._shared()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        """A copy that shares the engine."""
        return super().__deepcopy__((memo or {}) | {id(self.engine): self.engine})

    def _recipe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OF_ENGINE}

    def _shared(self) -> A3Engine:
        """The engine for these settings; one for all objects that have the same."""
        return shared_engine(**self._recipe())

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*OF_ENGINE, *PER_CALL)}

    def _identity(self, stop: list[str] | None, kwargs: dict[str, Any]) -> str:
        """All that can change an answer beside the prompt: the key of LangChain's caches."""
        of_request = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        options = {name: of_request.pop(name) for name in PER_CALL if name in of_request}
        return self.engine.identity(**self._options(stop, options), others=of_request)

    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        # What a cache asks of the engine would load the model on the event loop.
        await run_in_executor(None, lambda: self.engine.runtime)
        return await super().agenerate(*args, **kwargs)  # type: ignore[misc]

    def _options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Settings of one request, in the engine's words."""
        given = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        if unknown := set(given) - set(PER_CALL):
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(sorted(unknown))} for a call; "
                f"it takes {', '.join(PER_CALL)}."
            )
        given = {name: value for name, value in given.items() if value is not None}
        options = with_call({name: getattr(self, name) for name in PER_CALL}, given)
        options["max_new_tokens"] = options.pop("max_tokens")
        if stop is not None:
            options["stop"] = stop
        return in_engines_words(options)


def usage(report: FusionReport) -> dict[str, Any]:
    """Token counts as LangChain's ``UsageMetadata``; the details are parts of the input."""
    return {
        "input_tokens": report.prompt_tokens,
        "output_tokens": report.generated_tokens,
        "total_tokens": report.prompt_tokens + report.generated_tokens,
        "input_token_details": {
            "cache_read": report.cached_tokens,
            "cache_creation": report.created_tokens,
        },
    }


def about(report: FusionReport) -> dict[str, Any]:
    """What a response says of the model and of the fusion."""
    said = {
        "model_name": report.model,
        "model_provider": "a3",
        "finish_reason": report.finish_reason,
        "a3": report.to_dict(),
    }
    if report.logprobs is not None:
        said["logprobs"] = {"content": [_openai_logprob(entry) for entry in report.logprobs]}
    return said


def _openai_logprob(entry: TokenLogprob) -> dict[str, Any]:
    """In the form that OpenAI's models are known by."""
    top = [_priced(token, logprob) for token, logprob in entry.top]
    return _priced(entry.token, entry.logprob) | {"top_logprobs": top}


def _priced(token: str, logprob: float) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in token  # else it is a part of a character
    return {
        "token": token,
        "logprob": logprob,
        "bytes": list(token.encode()) if whole else None,
    }
