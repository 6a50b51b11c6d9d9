"""Shared engines. Unit tests make no network call: sockets are closed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks once, when it is imported

import pytest
import torch
from pytest_socket import disable_socket
from transformers import PretrainedConfig

from a3_engine import A3Engine
from a3_engine.native import loops
from tests.tiny import CHATML, LONG, STAND_IN, STRICT, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _no_network() -> None:
    disable_socket(allow_unix_socket=True)  # event loops make one to wake themselves


@pytest.fixture(scope="session", autouse=True)
def _loops() -> None:
    """There before the first test, so that no two answers differ by who rounded."""
    for dtype in (torch.float32, torch.bfloat16):
        loops.library(dtype, None)


@pytest.fixture
def tiny_engine(tmp_path: Path) -> Iterator[Callable[..., A3Engine]]:
    """Builds engines of tiny models, each with a store of its own test."""
    engines = []

    def build(model: str | PretrainedConfig = "llama", **options: object) -> A3Engine:
        if isinstance(model, PretrainedConfig):  # its window may be long
            options = {"stand_in": STAND_IN, **options}
        options = {"cache_dir": tmp_path / "cache", **options}
        engine = A3Engine.from_pretrained(tiny_model(model), tiny_tokenizer(), **options)
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module", params=[CHATML, STRICT, None], ids=["chatml", "strict", "none"])
def engine_of_any_template(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[A3Engine]:
    """A tiny model with a long window, by each template in turn."""
    engine = A3Engine.from_pretrained(
        tiny_model(LONG),
        tiny_tokenizer(request.param),
        cache_dir=tmp_path_factory.mktemp("any"),
        stand_in=STAND_IN,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[A3Engine]:
    """The real demo model in fp32; the unpacked weights stay in the user's cache folder."""
    from a3_engine.model.loading import default_cache_dir, load_model

    model, tokenizer = load_model(
        "smollm2-135m-instruct", cache_dir=default_cache_dir(), dtype=torch.float32
    )
    engine = A3Engine.from_pretrained(
        model, tokenizer, cache_dir=tmp_path_factory.mktemp("demo-store")
    )
    yield engine
    engine.close()
