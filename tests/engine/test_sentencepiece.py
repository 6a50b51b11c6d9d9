"""With SentencePiece, which puts a blank ahead of each text, a prompt is the template's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from a3_engine import A3Engine
from a3_engine.messages import Chunk, Message
from a3_engine.prompt import PromptPlanner
from tests.tiny import SHAPE, tiny_model

LLAMA_2 = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}{{ ('' if loop.previtem is defined and loop.previtem.role == "
    "'system' else bos_token + '[INST] ') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONVERSATIONS = [
    ["Who keeps the lamp?"],
    ["Context information is below.\n\nThe lamp burns.\n  - it is old\n\nQuery: who keeps it?\n"],
    ["Hello there", "Hello.", "Who keeps the lamp?"],
    ["Wer zündet die Lampe an? 灯塔 🗼", "Niemand ▁ weiß es.", "Why?"],
]


@pytest.fixture(scope="module", params=[LLAMA_2, ZEPHYR], ids=["llama2", "zephyr"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Llama 2's, from the installed package wordllama, which is not imported."""
    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("wordllama is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "tokenizers"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "l2_supercat_tokenizer_config.json")),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=request.param,
    )


def messages(words: list[str]) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(words)]


@pytest.mark.parametrize("words", CONVERSATIONS)
def test_a_conversation_has_the_templates_tokens(tokenizer, words):
    planned = PromptPlanner(tokenizer).plan(messages(words))
    turns = [{"role": message.role, "content": message.text} for message in messages(words)]
    whole = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.convert_ids_to_tokens(planned.ids) == tokenizer.convert_ids_to_tokens(whole)


def test_chunks_have_no_blank_of_their_own(tokenizer):
    """Wherever they stand their tokens are the same, and the prompt's text is the template's."""
    planner = PromptPlanner(tokenizer)
    chunks = ["The lamp burns through the night.", "The shore is steep."]
    content = [Chunk(chunks[0]), "\n\n", Chunk(chunks[1]), "\n\nWho keeps it?"]
    prompt = planner.plan([Message("user", content)])
    stored = [segment.ids for segment in prompt.segments if segment.kind == "chunk"]
    assert stored == [planner.chunk_ids(chunk) for chunk in chunks]
    turn = {"role": "user", "content": "\n\n".join([*chunks, "Who keeps it?"])}
    text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt.ids) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False).input_ids
    )
    first = prompt.segments[0]
    assert (first.kind, first.ids) == ("prefix", planner.prefix_ids)


def test_a_known_chunk_in_plain_text_stands_just_behind_the_prefix(tokenizer, tmp_path):
    config = {**SHAPE, "vocab_size": len(tokenizer)}
    engine = A3Engine.from_pretrained(
        tiny_model(LlamaConfig(**config)), tokenizer, cache_dir=tmp_path
    )
    text = "The lamp of the lighthouse burns through the whole night."
    engine.precompute([text], progress=False)
    prompt = engine.plan(f"{text}\n\nWho keeps it?")
    assert [segment.kind for segment in prompt.segments[:2]] == ["prefix", "chunk"]
    assert prompt.layout(engine.runtime.planner.prefix_ids).chunks[0].exact
    engine.close()
