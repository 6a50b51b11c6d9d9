"""Any history of the blocks that LangChain and its providers define, and of blocks like them."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    content,
)
from typing_extensions import is_typeddict

from a3_integrations.langchain import ChatA3
from tests.blocks import JSON, TEXTS, dictionaries, is_clear_refusal
from tests.langchain.test_other_models import LEFT_OUT, REFUSED, SAID

DEFINED = [one for one in vars(content).values() if is_typeddict(one)]
KNOWN = [*(block for block in SAID.values() if isinstance(block, dict)), *LEFT_OUT, *REFUSED]
TYPES = sorted({str(block["type"]) for block in KNOWN if "type" in block})
FIELDS = sorted({name for block in KNOWN for name in block} - {"type"})


def of_its_type(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    return {str: TEXTS, int: st.integers()}.get(hint, JSON)


def defined(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Of a type that LangChain defines, with values of its types or of others."""
    hints = get_type_hints(kind)
    named = {"type": of_its_type(hints["type"])} if "type" in hints else {}
    others = {name: hint for name, hint in hints.items() if name != "type"}
    return st.one_of(
        st.fixed_dictionaries(
            named, optional={name: of_its_type(hint) for name, hint in others.items()}
        ),
        dictionaries(named, list(others)),
    )


BLOCKS = st.one_of(
    *map(defined, DEFINED),
    st.sampled_from(KNOWN),
    dictionaries({"type": st.one_of(st.sampled_from(TYPES), JSON)}, FIELDS),
    dictionaries({}, FIELDS),
    TEXTS,
)
CONTENT = st.one_of(TEXTS, st.lists(BLOCKS, max_size=3))
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": TEXTS,
            "args": st.dictionaries(TEXTS, JSON, max_size=2),
            "id": st.one_of(st.none(), TEXTS),
        }
    ),
    max_size=2,
)
NAMES = st.one_of(st.none(), TEXTS)
ROLES = st.sampled_from(["user", "human", "ai", "assistant", "system", "developer", "odd", ""])
MESSAGES = st.one_of(
    st.builds(HumanMessage, CONTENT, name=NAMES),
    st.builds(SystemMessage, CONTENT),
    st.builds(AIMessage, CONTENT, tool_calls=CALLS, additional_kwargs=st.dictionaries(TEXTS, JSON)),
    st.builds(ToolMessage, CONTENT, tool_call_id=TEXTS, name=NAMES, artifact=JSON),
    st.builds(FunctionMessage, CONTENT, name=TEXTS),
    st.builds(ChatMessage, CONTENT, role=ROLES),
)


@pytest.fixture(scope="module")
def llm(engine_of_any_template):
    return ChatA3(engine=engine_of_any_template, max_tokens=1)


@given(st.lists(MESSAGES, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history_gives_a_prompt_or_a_clear_refusal(llm, history: list[BaseMessage]):
    try:
        n_tokens = llm.get_num_tokens_from_messages(history)
    except Exception as error:
        if not is_clear_refusal(error):
            raise
    else:
        assert (n_tokens > 0) == bool(history)
