"""The house rules that a reader relies on: who may import whom, how long a file is, where the pattern lives."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "nmsparse_deploy"
FILES = sorted(PACKAGE.rglob("*.py"))
SHIPS = ("export", "engines", "bench", "quant", "evaluate", "report")
FINDS = ("methods", "refine", "train", "learn", "learn_model", "prune", "block")
FREE_OF_THE_GROUP = ("methods", "block", "learn", "learn_model", "masks", "plan", "prune", "refine", "train", "stats", "walk")


def part(path: Path) -> str:
    """The room of the house: top-level file or folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Rooms that a file imports, relative imports resolved."""
    package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        names = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        found |= {name[1] for name in names if name[0] == "nmsparse_deploy"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependency_direction(path):
    seen, room = imports(path), part(path)
    if room in SHIPS:
        assert not seen & set(FINDS)
    if room not in ("__main__", "cli"):
        assert "cli" not in seen
    if room not in ("cli", "output"):
        assert "output" not in seen


def test_no_circles():
    """Rooms import each other in one direction when modules are loaded."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(part(path), set()).update(imports(path, top_level_only=True) - {part(path)})

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " -> ".join((*trail, room))
        for other in graph.get(room, ()):
            visit(other, (*trail, room))

    for room in graph:
        visit(room, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [p for p in FILES if {part(p), p.stem} & set(FREE_OF_THE_GROUP)], ids=lambda p: p.name)
def test_the_group_is_never_a_literal(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    assert not [t.start for t in tokens if t.type == tokenize.NUMBER and t.string == "4"]


def test_heavy_imports_are_inside_functions():
    light = [PACKAGE / f"{name}.py" for name in ("output", "errors", "registry", "__init__", "__main__", "progress")]
    for path in (*light, *(PACKAGE / "cli").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
        assert not names & {"torch", "numpy", "transformers", "pydantic", "onnx", "timm", "matplotlib", "safetensors"}
