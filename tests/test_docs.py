"""Python blocks of the README and the docs: they compile, what they import is there, some run."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import a3_engine
import a3_integrations.langchain
import a3_integrations.llama_index

ROOT = Path(__file__).parents[1]
OURS = ("a3_engine", "a3_integrations")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
README = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_compiles_and_its_imports_are_there(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(OURS):
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory):
    """A user's cache folder, in which the demo model is unpacked once."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.real_model
@pytest.mark.parametrize("block", README)
def test_the_readme_runs_as_it_stands(block, cache_home, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    exec(compile(block, "README.md", "exec"), {})
    assert "first token" in capsys.readouterr().out


def test_public_names_are_documented():
    reference = (ROOT / "docs/reference.md").read_text()
    for module in (a3_engine, a3_integrations.langchain, a3_integrations.llama_index):
        for name in set(module.__all__) - {"__version__"}:
            assert f"::: {module.__name__}.{name}\n" in reference, name
