"""What transformers' models tell their attention is honoured, harmless, or refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import transformers

from a3_engine.errors import UnsupportedModelError
from a3_engine.model.attention import HARMLESS, refuse_unknown

HONOURED = {"query", "key", "value", "attention_mask", "scaling", "sliding_window", "softcap"}
REFUSED = {"block_indices", "indices", "position_bias", "s_aux", "sinks"}
CALL = re.compile(r"(?<== )(?:attention|attn)_interface(\()(?=\n)")


def arguments_in(source: str) -> set[str]:
    """Names of the keyword arguments of calls of the registered attention function."""
    names = set()
    for call in CALL.finditer(source):
        indent = source[source.rindex("\n", 0, call.start()) + 1 :]
        indent = indent[: len(indent) - len(indent.lstrip())]
        stop = source.index(f"\n{indent})", call.end())
        parsed = ast.parse(f"f{source[call.start(1) : stop]}\n)", mode="eval").body
        assert isinstance(parsed, ast.Call)
        names |= {keyword.arg for keyword in parsed.keywords if keyword.arg}
    return names


def test_every_argument_of_every_model_is_known():
    """A new one has to be looked at: the gate refuses its models until then."""
    models = Path(transformers.__file__).parent / "models"
    sources = [path.read_text("utf-8") for path in models.glob("*/modeling_*.py")]
    names = set().union(*map(arguments_in, sources))
    assert names > HONOURED - {"query", "key", "value"}
    assert names - HONOURED - HARMLESS <= REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_engine_does_not_honour_is_refused(name):
    with pytest.raises(UnsupportedModelError, match=name):
        refuse_unknown({"dropout": 0.0, name: 1.0})
    refuse_unknown({"dropout": 0.0, name: None})
