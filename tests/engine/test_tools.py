"""Tools reach the model through any template, and every notation of a call is read back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3_engine.decoding.text_emitter import TextEmitter
from a3_engine.messages import Chunk, Message, ToolCall
from a3_engine.prompt import PromptPlanner
from a3_engine.schemas import without_references
from a3_engine.tools import MARKS, CallReader, call_grammar, json_grammar
from tests.texts import LAMP
from tests.tiny import CHATML, STRICT, tiny_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "find_keeper",
        "description": "Find a keeper.",
        "parameters": {
            "type": "object",
            "properties": {"year": {"type": "integer"}, "place": {"enum": ["shore", "harbour"]}},
            "required": ["year", "place"],
        },
    },
}
OTHER = {"type": "function", "function": {"name": "ring_bell", "description": "Ring."}}
# As the templates of Qwen and Llama do, in short: schemas in front, calls in JSON, no role "tool".
KNOWING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ 'CALL ' + call.function.name + ' ' + (call.function.arguments | tojson) }}{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shows the turns of two roles and forgets the others, as Phi-3's does.
FORGETFUL = (
    "{% for message in messages %}{% if message.role in ['user', 'assistant'] %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    Message("user", "Who keeps the lamp?"),
    Message("assistant", "", tool_calls=[ToolCall("find_keeper", {"year": 1911}, "call00001")]),
    Message("tool", ["Found: ", Chunk(LAMP)], name="find_keeper", tool_call_id="call00001"),
]


def planner(template: str | None) -> PromptPlanner:
    return PromptPlanner(tiny_tokenizer(template))


def shown(plans: PromptPlanner, messages: list[Message], tools: list[dict]) -> str:
    return plans.tokenizer.decode(plans.plan(messages, tools=tools).ids)


@pytest.mark.parametrize("template", [CHATML, STRICT, FORGETFUL, KNOWING, None])
def test_every_template_shows_tools_calls_and_results(template):
    plans = planner(template)
    prompt = plans.plan(CONVERSATION, tools=[TOOL, OTHER])
    text = plans.tokenizer.decode(prompt.ids)
    order = [text.index(part) for part in ("Find a keeper.", "Who keeps", '{"year": 1911}', LAMP)]
    assert order == sorted(order)
    assert "ring_bell" in text
    chunks = [s for s in prompt.segments if s.kind == "chunk"]
    assert [plans.tokenizer.decode(s.ids) for s in chunks] == [LAMP]


def test_a_template_that_knows_tools_shows_them_its_own_way():
    text = shown(planner(KNOWING), CONVERSATION, [TOOL])
    assert 'CALL find_keeper {"year": 1911}' in text
    assert "<tool_call>" not in text


def test_a_template_that_refuses_a_call_gets_it_spelled_out():
    refusing = (
        "{% if messages[1] and messages[1].tool_calls %}{{ raise_exception('no') }}{% endif %}"
    )
    assert "<tool_call>" in shown(planner(refusing + KNOWING), CONVERSATION, [TOOL])


def test_tools_join_the_system_message():
    system = Message("system", "Be brief.")
    text = shown(planner(CHATML), [system, *CONVERSATION], [TOOL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert text.count("<|im_start|>system") == 1


CALL = {"name": "find_keeper", "arguments": {"year": 1911, "place": "shore"}}
AS_STRING = CALL | {"arguments": json.dumps(CALL["arguments"])}
NOTATIONS = {
    "hermes": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
    "list in tags": f"<tool_call>[{json.dumps(CALL)}]</tool_call>",
    "unclosed": f"<tool_call>{json.dumps(CALL)}",
    "llama": json.dumps({"name": CALL["name"], "parameters": CALL["arguments"]}),
    "mistral": f" [{json.dumps(CALL)}]",
    "arguments as a string": f"<tool_call>{json.dumps(AS_STRING)}",
}


def read(text: str, size: int = 3) -> tuple[str, list, list]:
    reader = CallReader(["find_keeper"])
    shown = "".join(reader.put(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls, malformed = reader.end()
    return shown + rest, calls, malformed


@pytest.mark.parametrize("name", NOTATIONS)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_read_in_every_notation(name, size):
    text, calls, malformed = read(NOTATIONS[name], size)
    assert calls == [ToolCall("find_keeper", CALL["arguments"])]
    assert (text.strip(), malformed) == ("", [])


def test_text_before_calls_and_several_calls():
    text, calls, _ = read(f"I will look. {NOTATIONS['hermes']}\n{NOTATIONS['hermes']}")
    assert (text, len(calls)) == ("I will look. ", 2)


@pytest.mark.parametrize(
    "body", ['{"name": "find_keeper", "argu', '{"year": 1}', "[1]", '{"name": "a", "arguments": 3}']
)
def test_what_only_looks_like_a_call_is_reported(body):
    text, calls, malformed = read(f"<tool_call>{body}</tool_call>")
    assert (text, calls) == ("", [])
    assert malformed[0].text == body


def test_json_that_is_no_call_is_text():
    for answer in ('{"name": "Ada"}', "[1, 2]", '{"a": ', "{not json}"):
        assert read(answer) == (answer, [], [])


@given(st.text(alphabet="<tool_cal>/x{[ "), st.integers(1, 9))
def test_no_text_is_lost_or_repeated_by_holding_back(answer, size):
    text, calls, malformed = read(answer, size)
    head = answer.split("<tool_call>")[0]
    assert text == head
    assert not calls
    assert bool(malformed) == ("<tool_call>" in answer)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_is_forced_to_call(tiny_engine, seed):
    """Even a model that knows nothing makes a call that fits one of the schemas."""
    torch.manual_seed(seed)
    engine = tiny_engine()
    options = {"max_new_tokens": 200, "temperature": 1.0, "grammar": call_grammar([TOOL, OTHER])}
    text, calls, malformed = read(engine.generate("Who?", **options).text)
    assert (text, malformed, len(calls)) == ("", [], 1)
    (call,) = calls
    if call.name == "find_keeper":
        assert isinstance(call.arguments["year"], int)
        assert call.arguments["place"] in ("shore", "harbour")
        assert set(call.arguments) == {"year", "place"}
    else:
        assert (call.name, call.arguments) == ("ring_bell", {})


def test_a_grammar_holds_on_a_fused_prompt_too(tiny_engine):
    engine = tiny_engine()
    schema = {"type": "object", "properties": {"lit": {"type": "boolean"}}, "required": ["lit"]}
    answer = engine.generate("Lit?", chunks=[LAMP], max_new_tokens=40, grammar=json_grammar(schema))
    assert answer.report.fused
    assert set(json.loads(answer.text)) == {"lit"}
    assert answer.report.finish_reason == "stop"


def test_beside_tools_an_answer_is_json_or_a_call(tiny_engine):
    """Whichever a random model chooses, it fits."""
    engine = tiny_engine()
    schema = {"type": "object", "properties": {"lit": {"type": "boolean"}}, "required": ["lit"]}
    kinds = set()
    for seed in range(8):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 200, "temperature": 1.0, "selector": "full_prefill"}
        answer = engine.generate("Lit?", grammar=json_grammar(schema, [OTHER]), **options)
        text, calls, malformed = read(answer.text)
        assert malformed == []
        if calls:
            assert (text, [call.name for call in calls]) == ("", ["ring_bell"])
        else:
            assert set(json.loads(text)) == {"lit"}
        kinds.add(bool(calls))
    assert kinds == {True, False}


def test_a_wrong_grammar_says_so(tiny_engine):
    with pytest.raises(ValueError, match="grammar"):
        tiny_engine().generate("Who?", max_new_tokens=2, grammar="start: nowhere")


CALLED = [ToolCall("find_keeper", {"year": 1911, "place": "shore"}), ToolCall("ring_bell", {})]
JSON = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in CALLED]
MARKED = {
    "hermes": [f"<tool_call>\n{body}\n</tool_call>\n" for body in JSON],
    "mistral, names": [
        f"[TOOL_CALLS]{call.name}[ARGS]{json.dumps(call.arguments)}" for call in CALLED
    ],
    "mistral, ids": [
        f"[TOOL_CALLS]{call.name}[CALL_ID]a1b2c3d4e[ARGS]{json.dumps(call.arguments)}"
        for call in CALLED
    ],
    "mistral, list": ["[TOOL_CALLS] [", JSON[0], ", ", JSON[1], "]"],
    "granite": ["<|tool_call|>[", JSON[0], ", ", JSON[1], "]"],
    "llama": ["<|python_tag|>", JSON[0], "<|python_tag|>", JSON[1]],
}


@pytest.mark.parametrize("before", ["", "I shall look it up. ", "Two things: [1] {2}\n"])
@pytest.mark.parametrize("notation", MARKED)
@pytest.mark.parametrize("special", [True, False])
def test_calls_are_read_though_their_marks_are_control_tokens(notation, before, special):
    """In any model's notation, with words before them, one or two, however they are streamed."""
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", *MARKS]},
            replace_extra_special_tokens=False,
        )
    text = before + "".join(MARKED[notation]) + "<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    reader, pieces = CallReader(["find_keeper", "ring_bell"]), []
    emitter = TextEmitter(tokenizer, lambda piece: pieces.append(reader.put(piece)), (), MARKS)
    for token in ids:
        emitter.put(token)
    emitter.end()
    rest, calls, bad = reader.end()
    assert bad == []
    assert [(call.name, dict(call.arguments)) for call in calls] == [
        (call.name, dict(call.arguments)) for call in CALLED
    ]
    assert "".join(pieces) + rest == before


LLAMA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'tool' %}"
    "{% if message.content is mapping or message.content is iterable %}"
    "{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}"
    "{% elif message.tool_calls %}{{ message.tool_calls[0].function | tojson }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "said", ['He said "no".\nThen\tnothing \\ more.', "Zürich 日本 🙂", '{"a": [1, "b"]}', "plain"]
)
def test_a_result_is_written_as_the_template_writes_it(said):
    """Llama's templates make a JSON string of it."""
    planner = PromptPlanner(tiny_tokenizer(LLAMA))
    call = ToolCall("f", {}, "1")
    turns = [
        Message("user", 'Call "f".\n'),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", said, name="f", tool_call_id="1"),
    ]
    shown = planner.tokenizer.decode(planner.plan(turns).ids)
    rendered = planner.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": 'Call "f".\n'},
            turns[1].in_template(""),
            {"role": "tool", "content": said, "name": "f", "tool_call_id": "1"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert shown == rendered
    # A document in it stays the chunk that it is.
    document = Chunk(f'Document: "{said}" and so on, for more than thirty letters.')
    turns[2] = Message("tool", ['Found "it":\n', document, "\n"], tool_call_id="1")
    prompt = planner.plan(turns)
    assert document.text in planner.tokenizer.decode(prompt.ids)
    assert [s.text for s in prompt.segments if s.kind == "chunk"] == [document.text]
    assert '\\"it\\":\\n' in planner.tokenizer.decode(prompt.ids)


def test_references_are_replaced_by_what_they_point_at():
    lamp = {"type": "object", "properties": {"lit": {"type": "boolean"}}}
    shore = {"type": "array", "items": {"$ref": "#/$defs/Lamp"}}
    named = {"$ref": "#/$defs/Shore", "description": "Where."}
    schema = {"properties": {"at": named}, "$defs": {"Lamp": lamp, "Shore": shore}}
    at = {"type": "array", "items": lamp, "description": "Where."}
    assert without_references(schema) == {"properties": {"at": at}}
    older = json.loads(json.dumps(schema).replace("$defs", "definitions"))
    assert without_references(older) == {"properties": {"at": at}}


@pytest.mark.parametrize("target", ["#/$defs/Lamp", "#/properties/at"])
def test_a_schema_that_cannot_be_written_out_stays(target):
    """It holds itself, or refers to no definition."""
    lamp = {"properties": {"next": {"$ref": target}}}
    schema = {"properties": {"at": {"$ref": "#/$defs/Lamp"}}, "$defs": {"Lamp": lamp}}
    assert without_references(schema) == schema
