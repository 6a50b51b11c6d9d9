"""Values of any form for content blocks, and what counts as a clear refusal."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from a3_engine import A3Error

TEXTS = st.one_of(st.sampled_from(["", " ", "Who?", "\ud835", "<|im_end|>"]), st.text(max_size=12))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def dictionaries(required: dict[str, Any], names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Dicts with what is required and any values, of any form, for some of the other names."""
    return st.fixed_dictionaries(required, optional=dict.fromkeys(names, JSON))


def is_clear_refusal(error: Exception) -> bool:
    """One sentence of ours, said on purpose, that does not speak of Python's own affairs."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).as_posix()
    ours = "/a3_engine/" in where or "/a3_integrations/" in where
    said = str(error)
    return (
        isinstance(error, (ValueError, TypeError, A3Error))
        and ours
        and 20 < len(said) < 600
        and "object is not" not in said
        and "unexpected keyword" not in said
    )
