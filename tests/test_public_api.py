"""What `import nmsparse_deploy` promises: its names, their types and its version."""

import ast
import tomllib

import pytest

import nmsparse_deploy as nms
from tests import ROOT


def test_type_checkers_see_the_names_that_are_loaded():
    tree = ast.parse((ROOT / "nmsparse_deploy/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"nmsparse_deploy.{module}" for name, module in nms._PUBLIC.items()}


@pytest.mark.parametrize("name", nms.__all__)
def test_every_public_name_loads_and_has_a_docstring(name):
    assert getattr(nms, name).__doc__.strip()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        nms.prun  # noqa: B018


def test_the_version_stands_in_one_place_and_the_package_says_that_it_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert nms.__version__ == project["project"]["version"]
    assert (ROOT / "nmsparse_deploy/py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["nmsparse_deploy"]
