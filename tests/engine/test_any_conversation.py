"""Any conversation, by hypothesis: the prompt is the template's own text, and chunks stay whole."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from a3_engine.prompt import Chunk, Message, PromptPlanner
from tests.tiny import CHATML, tiny_tokenizer

# No lone surrogate: no tokenizer takes one.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["<|im_end|>", "<s>x"]  # only characters, in a text
)
PARTS = st.lists(TEXT | TEXT.map(Chunk), min_size=1, max_size=5)


@functools.cache
def planner() -> PromptPlanner:
    return PromptPlanner(tiny_tokenizer(CHATML))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns of user and assistant, after a system turn or not; the last one is the user's."""
    turns = draw(st.integers(0, 2))
    roles = ["user", "assistant"] * turns + ["user"]
    messages = [Message(role, draw(PARTS)) for role in roles]
    if draw(st.booleans()):
        messages.insert(0, Message("system", draw(TEXT)))
    return messages


@settings(max_examples=200, deadline=None)
@given(conversations())
def test_a_prompt_says_what_the_conversation_says(messages):
    """Decoded it is what the template writes, and each chunk's ids are those of its text alone."""
    plans = planner()
    prompt = plans.plan(messages, blank=True)
    parts = [
        [message.content] if isinstance(message.content, str) else message.content
        for message in messages
    ]
    # Blanks around a chunk's text are not the document's.
    said = [[p.text.strip() if isinstance(p, Chunk) else p for p in each] for each in parts]
    chunks = [part.text.strip() for each in parts for part in each if isinstance(part, Chunk)]
    planned = [segment for segment in prompt.segments if segment.kind == "chunk"]
    assert [segment.text for segment in planned] == [text for text in chunks if text]
    assert [segment.ids for segment in planned] == [plans.chunk_ids(t) for t in chunks if t]
    conversation = [
        {"role": message.role, "content": "".join(each)}
        for message, each in zip(messages, said, strict=True)
    ]
    assert plans.tokenizer.decode(prompt.ids) == plans.tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    )
    # Every token has one place: what is cached lies where its ids do.
    for start, segment in prompt.cached:
        assert prompt.ids[start : start + len(segment.ids)] == list(segment.ids)
