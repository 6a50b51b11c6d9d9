"""Features of `HuggingFaceLLM` and `A3LLM` side by side, each row run on the same model folder.

    pip install -e ".[gguf,llama-index,compare]"   # in a checkout

Prints a Markdown table. A probe returns whether the feature works; one that raises says no.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from features import PASSAGES, PROMPT, both_ways, event_loop_is_free, table_row, works
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.huggingface import HuggingFaceLLM

from a3_integrations.llama_index import A3LLM

MESSAGES = [ChatMessage(role="user", content=PROMPT)]
Make = Callable[..., Any]


def counted(make: Make, call: Callable[[Any], object]) -> bool:
    """The handler's counts are the model's own: 4 tokens were asked for."""
    counter = TokenCountingHandler()
    llm = make(max_new_tokens=4, callback_manager=CallbackManager([counter]))
    call(llm)
    llm_tokens = len(llm_tokenizer(llm).apply_chat_template([{"role": "user", "content": PROMPT}]))
    return counter.completion_llm_token_count == 4 and counter.prompt_llm_token_count > llm_tokens


def llm_tokenizer(llm: Any) -> Any:
    return llm.engine.runtime.tokenizer if isinstance(llm, A3LLM) else llm._tokenizer


def stream_follows_completion_to_prompt(make: Make) -> bool:
    llm = make(max_new_tokens=8, completion_to_prompt=lambda _: "One, two, three, four,")
    return list(llm.stream_complete("x"))[-1].text == llm.complete("x").text


def next_turn(make: Make) -> bool:
    llm = make(max_new_tokens=8)
    answer = llm.chat(MESSAGES).message
    again = llm.chat([*MESSAGES, answer, ChatMessage(role="user", content="Which is first?")])
    return again.raw["a3"]["reused_turn_tokens"] > 0


def passages_in_any_order(make: Make) -> bool:
    llm = make(max_new_tokens=2)
    if isinstance(llm, A3LLM):
        llm.engine.precompute(PASSAGES, progress=False)
    answer = llm.complete("\n\n".join(reversed(PASSAGES)) + "\n\n" + PROMPT)
    return answer.raw["a3"]["hits"] == 2


PROBES: dict[str, Callable[[Make], bool]] = {
    "`complete`, `chat`": lambda make: (
        bool(make().complete(PROMPT).text) and bool(make().chat(MESSAGES).message.content)
    ),
    "`stream_complete`, `stream_chat`": lambda make: (
        len(list(make().stream_complete(PROMPT))) > 1
        and len(list(make().stream_chat(MESSAGES))) > 1
    ),
    "`acomplete`, `achat`": lambda make: (
        bool(asyncio.run(make().acomplete(PROMPT)).text)
        and bool(asyncio.run(make().achat(MESSAGES)).message.content)
    ),
    "async leaves the event loop free": lambda make: event_loop_is_free(
        lambda: make(max_new_tokens=24).achat(MESSAGES)
    ),
    "token counts of the model in `TokenCountingHandler`": lambda make: (
        "usage" in make().chat(MESSAGES).raw and counted(make, lambda llm: llm.chat(MESSAGES))
    ),
    "the same while streaming": lambda make: (
        "usage" in list(make().stream_chat(MESSAGES))[-1].raw
        and counted(make, lambda llm: list(llm.stream_chat(MESSAGES)))
    ),
    "stop strings for a call": lambda make: (
        " " not in make().complete("Say: red, green, blue.", stop=[" "]).text.strip()
    ),
    "`max_tokens` for a call": lambda make: (
        make().complete(PROMPT, max_tokens=2).text == make(max_new_tokens=2).complete(PROMPT).text
    ),
    "`temperature` for a call": lambda make: (
        len({make().complete(PROMPT, temperature=3.0).text for _ in range(3)}) > 1
    ),
    "an unknown option is an error": lambda make: not _runs(make, nonsense=1),
    "`system_prompt`, `predict`": lambda make: bool(
        make(system_prompt="Answer in one word.").predict(PromptTemplate(PROMPT))
    ),
    "`completion_to_prompt`, streaming too": stream_follows_completion_to_prompt,
    "passages from the cache, in any order": passages_in_any_order,
    "next turn goes on with the last one's cache": next_turn,
    "log probabilities": lambda make: (
        len(make(max_new_tokens=4).chat(MESSAGES, logprobs=True).logprobs) == 4
    ),
}


def _runs(make: Make, **options: Any) -> bool:
    try:
        make().complete(PROMPT, **options)
    except TypeError:
        return False
    return True


def main() -> None:
    with both_ways() as (engine, model, tokenizer):

        def plain(**options: Any) -> HuggingFaceLLM:
            fields = {"context_window": 8192, "max_new_tokens": 12, "is_chat_model": True} | options
            return HuggingFaceLLM(model=model, tokenizer=tokenizer, **fields)

        def ours(**options: Any) -> A3LLM:
            return A3LLM(engine=engine, **{"max_new_tokens": 12, **options})

        table_row("feature", "HuggingFaceLLM", "A3LLM")
        table_row(*["---"] * 3)
        for name, probe in PROBES.items():
            table_row(name, works(probe, plain), works(probe, ours))


if __name__ == "__main__":
    main()
