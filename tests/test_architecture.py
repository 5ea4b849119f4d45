"""The house rules that a reader relies on. Who may import whom is a contract of import-linter in
pyproject.toml."""

from __future__ import annotations

import ast
import io
import tokenize

import pytest

from tests import ROOT

PACKAGE = ROOT / "nmsparse_deploy"
FILES = sorted(PACKAGE.rglob("*.py"))
FREE_OF_THE_GROUP = [*(PACKAGE / "find").rglob("*.py"), PACKAGE / "masks.py"]
FREE_OF_THE_GROUP.remove(PACKAGE / "find/footprint.py")  # counts bytes


def test_the_package_has_few_rooms_at_its_door():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", FREE_OF_THE_GROUP, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_group_is_never_a_literal(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    assert not [t.start for t in tokens if t.type == tokenize.NUMBER and t.string == "4"]


def test_heavy_imports_are_inside_functions():
    light = [
        PACKAGE / f"{name}.py"
        for name in ("errors", "registry", "pattern", "__init__", "__main__", "system/progress")
    ]
    for path in (*light, *(PACKAGE / "cli").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {
            alias.name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {
            node.module.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not names & {
            "torch",
            "numpy",
            "transformers",
            "pydantic",
            "onnx",
            "timm",
            "matplotlib",
            "safetensors",
        }
