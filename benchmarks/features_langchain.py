"""Features of langchain-huggingface's local classes and of ours, each row run on one model folder.

    pip install -e ".[gguf,langchain,compare]"   # in a checkout

Four columns: `ChatHuggingFace` over `HuggingFacePipeline` and `ChatA3`, `HuggingFacePipeline` and
`A3LLM`. Prints a Markdown table. A probe returns whether the feature works, asked for in the words
of the class; one that raises says no. A dash stands where a text-completion model has no such
thing.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from features import PASSAGES, PROMPT, both_ways, event_loop_is_free, table_row, works
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from pydantic import BaseModel
from transformers import pipeline

from a3_integrations.langchain import A3LLM, ChatA3

COUNT = "Count from one to twenty in words."
N_TOKENS = 8


@dataclass
class Side:
    """A class under test.

    Parameters
    ----------
    make : callable
        An object of the class on the loaded model; takes the class's own settings.
    named : callable
        An object that was told the model's folder only.
    limit, hot : callable
        What a call is given for another length, and for a temperature of 3, in the class's words.
    model, tokenizer
        The loaded model that computes the answers, and its tokenizer.
    together : dict
        The settings by which the class computes a batch's prompts together.
    """

    make: Callable[..., Any]
    named: Callable[[], Any]
    limit: Callable[[int], dict[str, Any]]
    hot: dict[str, Any]
    model: Any
    tokenizer: Any
    together: dict[str, Any] = field(default_factory=dict)


class Tokens(BaseCallbackHandler):
    """Counts the tokens that a callback is told of, and keeps what a tracer would know."""

    def __init__(self) -> None:
        self.pieces = 0
        self.metadata: dict[str, Any] = {}

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.pieces += 1

    def on_chat_model_start(self, *_: Any, metadata: Any = None, **__: Any) -> None:
        self.metadata = metadata

    def on_llm_start(self, *_: Any, metadata: Any = None, **__: Any) -> None:
        self.metadata = metadata


class Colour(BaseModel):
    name: str


def ring_bell(loud: bool) -> str:
    """Ring the bell."""
    return "ding"


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.content


def usage(side: Side, answer: Any) -> bool:
    """The counts are the model's own."""
    rendered = side.tokenizer.apply_chat_template(
        [{"role": "user", "content": COUNT}], add_generation_prompt=True, tokenize=False
    )
    counts = answer.usage_metadata
    return (counts["input_tokens"], counts["output_tokens"]) == (
        len(side.tokenizer(rendered).input_ids),
        N_TOKENS,
    )


def whole(chunks: Any) -> Any:
    chunks = list(chunks)
    answer = chunks[0]
    for chunk in chunks[1:]:
        answer += chunk
    return answer


def forwards(side: Side, call: Callable[[], object]) -> int:
    """Passes through the model that a call takes, its threads' included."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = side.model.register_forward_pre_hook(counted)
    try:
        call()
    finally:
        hook.remove()
    return count


def leaving_stops(side: Side) -> bool:
    started = time.perf_counter()
    whole_answer = forwards(side, lambda: list(side.make().stream(COUNT, **side.limit(60))))
    seconds = time.perf_counter() - started

    def leave() -> None:
        stream = side.make().stream(COUNT, **side.limit(60))
        next(stream)
        stream.close()
        time.sleep(seconds + 2)

    return forwards(side, leave) < whole_answer / 2


def computed_together(side: Side) -> bool:
    llm = side.make(**side.together)
    alone = forwards(side, lambda: llm.invoke(COUNT))
    return forwards(side, lambda: llm.batch([COUNT, COUNT])) < 2 * alone


def stop_word(side: Side) -> tuple[str, str]:
    """What is answered without a stop string, and a stop string of several tokens in it."""
    answer = text(side.make().invoke(COUNT, **side.limit(20))).strip()
    return answer, answer[len(answer) // 3 : 2 * len(answer) // 3]


def stops(side: Side, ask: Callable[[Any, list[str]], str]) -> bool:
    answer, word = stop_word(side)
    return ask(side.make(), [word]).strip() == answer[: answer.index(word)].strip()


def callback_pieces(side: Side, stream: bool, **settings: Any) -> bool:
    tokens, llm = Tokens(), side.make(**settings)
    config = {"callbacks": [tokens]}
    _ = list(llm.stream(COUNT, config)) if stream else llm.invoke(COUNT, config)
    return tokens.pieces > 1


def model_in_trace(side: Side) -> bool:
    tokens, llm = Tokens(), side.make()
    llm.invoke(COUNT, {"callbacks": [tokens]})
    return bool(tokens.metadata.get("ls_model_name"))


def passages_in_any_order(side: Side) -> bool:
    llm = side.make()
    llm.engine.precompute(PASSAGES, progress=False)
    prompt = "\n\n".join(reversed(PASSAGES)) + "\n\n" + PROMPT
    if isinstance(llm, ChatA3):
        return llm.invoke(prompt).response_metadata["a3"]["hits"] == 2
    return llm.generate([prompt]).generations[0][0].generation_info["a3"]["hits"] == 2


def next_turn(side: Side) -> bool:
    llm = side.make()
    conversation = [HumanMessage(COUNT)]
    answer = llm.invoke(conversation)
    again = llm.invoke([*conversation, answer, HumanMessage("Which is first?")])
    return again.response_metadata["a3"]["reused_turn_tokens"] > 0


def tool_result(side: Side) -> bool:
    call = {"name": "ring_bell", "args": {"loud": True}, "id": "abcdefghi"}
    history = [HumanMessage("Ring."), AIMessage("", tool_calls=[call])]
    return bool(side.make().invoke([*history, ToolMessage("ding", tool_call_id="abcdefghi")]))


def same_when_loaded(side: Side) -> bool:
    llm = side.named()
    space = type(llm).__module__.split(".")[0]
    loaded = load(dumpd(llm), allowed_objects=[type(llm)], valid_namespaces=[space])
    return loaded.dict() == llm.dict()


def rejects_unknown(side: Side) -> bool:
    try:
        side.make().invoke(PROMPT, nonsense=1)
    except (TypeError, ValueError):
        return True
    return False


BOTH: dict[str, Callable[[Side], bool]] = {
    "`invoke`": lambda side: bool(text(side.make().invoke(COUNT)).strip()),
    "`stream` in pieces, the same text": lambda side: (
        len(list(side.make().stream(COUNT))) > 2
        and "".join(map(text, side.make().stream(COUNT))).strip()
        == text(side.make().invoke(COUNT)).strip()
    ),
    "`ainvoke`": lambda side: bool(text(asyncio.run(side.make().ainvoke(COUNT)))),
    "`astream` in pieces": lambda side: asyncio.run(_apieces(side)) > 2,
    "async leaves the event loop free": lambda side: event_loop_is_free(
        lambda: side.make().ainvoke(COUNT)
    ),
    "`batch` answers as `invoke` does": lambda side: (
        [text(answer) for answer in side.make().batch([COUNT, PROMPT])]
        == [text(side.make().invoke(prompt)) for prompt in (COUNT, PROMPT)]
    ),
    "a batch is computed together": computed_together,
    "stop strings for a call": lambda side: stops(
        side, lambda llm, stop: text(llm.invoke(COUNT, stop=stop, **side.limit(20)))
    ),
    "stop strings while streaming": lambda side: stops(
        side,
        lambda llm, stop: "".join(map(text, llm.stream(COUNT, stop=stop, **side.limit(20)))),
    ),
    "another length for a call": lambda side: (
        len(side.tokenizer(text(side.make().invoke(COUNT, **side.limit(3)))).input_ids) <= 3
    ),
    "another temperature for a call": lambda side: (
        len({text(side.make().invoke(COUNT, **side.hot)) for _ in range(3)}) > 1
    ),
    "an unknown option is an error": rejects_unknown,
    "leaving a stream stops the computation": leaving_stops,
    "token callbacks while streaming": lambda side: callback_pieces(side, stream=True),
    "model's name in traces": model_in_trace,
    "`get_num_tokens` by the model's tokenizer": lambda side: (
        side.make().get_num_tokens(COUNT) == len(side.tokenizer(COUNT).input_ids)
    ),
    "passages from the cache, in any order": passages_in_any_order,
    "serialization (`dumpd`, `load`)": same_when_loaded,
    "pickling": lambda side: bool(pickle.loads(pickle.dumps(side.named()))),
}
CHAT: dict[str, Callable[[Side], bool]] = {
    "`usage_metadata`": lambda side: usage(side, side.make().invoke(COUNT)),
    "`usage_metadata` while streaming": lambda side: usage(side, whole(side.make().stream(COUNT))),
    "finish reason and model's name with the answer": lambda side: (
        {"finish_reason", "model_name"} <= side.make().invoke(COUNT).response_metadata.keys()
    ),
    "token callbacks in `invoke` (`streaming=True`)": lambda side: callback_pieces(
        side, stream=False, streaming=True
    ),
    "content blocks of text": lambda side: (
        side.make().invoke([HumanMessage([{"type": "text", "text": COUNT}])]).content
        == side.make().invoke(COUNT).content
    ),
    "`bind_tools`, a forced call": lambda side: bool(
        side.make()
        .bind_tools([ring_bell], tool_choice="ring_bell")
        .invoke("Ring it loudly.", **side.limit(48))
        .tool_calls
    ),
    "a tool's result in the history": tool_result,
    "`with_structured_output`": lambda side: isinstance(
        side.make()
        .with_structured_output(Colour, method="json_schema")
        .invoke("Name a colour as JSON.", **side.limit(48)),
        Colour,
    ),
    "log probabilities": lambda side: bool(
        side.make(logprobs=True).invoke(COUNT).response_metadata["logprobs"]["content"]
    ),
    "`profile` with the context window": lambda side: (
        side.make().profile["max_input_tokens"] == side.model.config.max_position_embeddings
    ),
    "`get_num_tokens_from_messages` by the model's template": lambda side: (
        side.make().get_num_tokens_from_messages([HumanMessage(COUNT)])
        == side.make().invoke(COUNT).usage_metadata["input_tokens"]
    ),
    "next turn goes on with the last one's cache": next_turn,
}


async def _apieces(side: Side) -> int:
    return len([piece async for piece in side.make().astream(COUNT)])


def main() -> None:
    with both_ways() as (engine, model, tokenizer):

        def completion(batch_size: int = 1) -> HuggingFacePipeline:
            generate = pipeline(
                "text-generation",
                model=model,
                tokenizer=tokenizer,
                max_new_tokens=N_TOKENS,
                do_sample=False,  # it samples unless told
                return_full_text=False,
                batch_size=batch_size,
            )
            return HuggingFacePipeline(pipeline=generate, batch_size=batch_size)

        def chat(**settings: Any) -> ChatHuggingFace:
            return ChatHuggingFace(llm=completion(), tokenizer=tokenizer, **settings)

        folder = model.config._name_or_path

        def completion_by_name() -> HuggingFacePipeline:
            return HuggingFacePipeline.from_model_id(folder, task="text-generation")

        def chat_by_name() -> ChatHuggingFace:
            return ChatHuggingFace(llm=completion_by_name(), tokenizer=tokenizer)

        theirs = {
            "limit": lambda n: {"pipeline_kwargs": {"max_new_tokens": n}},
            "hot": {"pipeline_kwargs": {"do_sample": True, "temperature": 3.0}},
            "model": model,
            "tokenizer": tokenizer,
        }
        ours = {
            "limit": lambda n: {"max_tokens": n},
            "hot": {"temperature": 3.0},
            "model": engine.runtime.model,
            "tokenizer": tokenizer,
        }
        common = {"engine": engine, "max_tokens": N_TOKENS}
        sides = [
            Side(chat, chat_by_name, **theirs),
            Side(partial(ChatA3, **common), partial(ChatA3, model=folder), **ours),
            Side(completion, completion_by_name, **theirs, together={"batch_size": 2}),
            Side(partial(A3LLM, **common), partial(A3LLM, model=folder), **ours),
        ]
        table_row("feature", "ChatHuggingFace", "ChatA3", "HuggingFacePipeline", "A3LLM")
        table_row(*["---"] * 5)
        for name, probe in BOTH.items():
            table_row(name, *(works(probe, side) for side in sides))
        for name, probe in CHAT.items():
            table_row(name, *(works(probe, side) for side in sides[:2]), "–", "–")


if __name__ == "__main__":
    main()
