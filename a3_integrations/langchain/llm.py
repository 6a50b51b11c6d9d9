"""The engine as a LangChain text-completion model, for chains that are built around one.

The prompt is taken as it stands: no chat template is put around it. Use `ChatA3` for models that
were trained on one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables.config import ContextThreadPoolExecutor, run_in_executor

from a3_engine import FusionReport
from a3_integrations.langchain.settings import (
    ALIASES,
    PER_CALL,
    A3Settings,
    about,
    langchains_errors,
    usage,
)

AT_ONCE = 8  # prompts of one batch; each holds a cache


class A3LLM(A3Settings, BaseLLM):
    """A local model that completes text from cached chunks, found in it by their exact text.

    Examples
    --------
    >>> llm = A3LLM(model="smollm2-135m-instruct", max_tokens=64)
    >>> chain = PromptTemplate.from_template("{context}\\n\\nQ: {question}\\nA:") | llm
    """

    @property
    def _llm_type(self) -> str:
        return "a3"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return params | LangSmithParams(ls_provider="a3", ls_model_name=self.model)

    def asdict(self) -> dict[str, Any]:
        """The settings, and a name for all that can change an answer: the key of caches."""
        return {**super().asdict(), "identity": self._identity(None, {})}

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        settings, others = self._split(stop, kwargs)
        return super(A3LLM, self._with(settings)).generate(prompts, None, *args, **others)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        settings, others = self._split(stop, kwargs)
        return await super(A3LLM, self._with(settings)).agenerate(prompts, None, *args, **others)

    def _split(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A call's own settings, and the rest."""
        given = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        others = {name: given.pop(name) for name in set(given) - set(PER_CALL)}
        given = {name: value for name, value in given.items() if value is not None}
        return given if stop is None else given | {"stop": stop}, others

    def _with(self, settings: dict[str, Any]) -> A3LLM:
        """The same model with a call's own settings, which LangChain's cache does not go by."""
        return self.model_copy(update=settings) if settings else self

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        request = self.engine.runtime.planner.plan_raw(prompt)
        with (
            langchains_errors(),
            self.engine.stream(request, **self._raw_options(stop, kwargs)) as stream,
        ):
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield _last_chunk(stream.report)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        request = await run_in_executor(None, lambda: self.engine.runtime.planner.plan_raw(prompt))
        stream = await self.engine.astream(request, **self._raw_options(stop, kwargs))
        try:
            with langchains_errors():
                async for piece in stream:
                    chunk = GenerationChunk(text=piece)
                    if run_manager:
                        await run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
        finally:
            stream.close()
        yield _last_chunk(stream.report)

    def _raw_options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        options = self._options(stop, kwargs)
        del options["conversation"]  # a prompt to complete has no turns
        return options

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        def answer(prompt: str) -> list[GenerationChunk]:
            return list(self._stream(prompt, stop, **kwargs))

        with ContextThreadPoolExecutor(AT_ONCE) as pool:  # they decode together
            return _result(list(pool.map(answer, prompts)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        turn = asyncio.Semaphore(AT_ONCE)

        async def answer(prompt: str) -> list[GenerationChunk]:
            async with turn:
                return [chunk async for chunk in self._astream(prompt, stop, **kwargs)]

        return _result(await asyncio.gather(*map(answer, prompts)))


def _last_chunk(report: FusionReport | None) -> GenerationChunk:
    assert report is not None
    return GenerationChunk(
        text="", generation_info=about(report) | {"usage_metadata": usage(report)}
    )


def _result(answers: list[list[GenerationChunk]]) -> LLMResult:
    return LLMResult(
        generations=[
            [
                Generation(
                    text="".join(chunk.text for chunk in chunks),
                    generation_info=chunks[-1].generation_info,
                )
            ]
            for chunks in answers
        ]
    )
