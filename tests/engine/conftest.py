"""An engine whose answers have no end of their own."""

from __future__ import annotations

import pytest

from a3_engine import A3Engine
from tests.tiny import LONG

NEVER = 10_000  # no such token


@pytest.fixture
def endless(tiny_engine) -> A3Engine:
    """Its answers go on to the last token that they may have."""
    engine = tiny_engine(LONG)
    engine.runtime.model.generation_config.eos_token_id = NEVER
    return engine
