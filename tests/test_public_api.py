"""What `import nmsparse_deploy` promises: its names, their types and its version."""

import ast
import subprocess
import sys
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


STEPS = """
import random, sys
from importlib import import_module
from pkgutil import walk_packages
import nmsparse_deploy as nms

if sys.argv[1] == "names first":
    assert all(getattr(nms, name) for name in nms.__all__)
rooms = [m.name for m in walk_packages(nms.__path__, "nmsparse_deploy.") if not m.name.endswith("__main__")]
mixed = random.Random(0).sample(rooms + nms.__all__, len(rooms) + len(nms.__all__))
for step in mixed if sys.argv[1] == "mixed" else rooms:
    try:
        getattr(nms, step) if step in nms.__all__ else import_module(step)
    except ModuleNotFoundError as error:  # a library that is optional
        if error.name.startswith("nmsparse_deploy"):
            raise
for name in nms.__all__:
    defined = getattr(import_module(f"nmsparse_deploy.{nms._PUBLIC[name]}"), name)
    if not callable(defined) or getattr(nms, name) is not defined:
        print(f"nms.{name} is {getattr(nms, name)}")
"""


@pytest.mark.parametrize("order", ["rooms first", "names first", "mixed"])
def test_no_module_takes_the_place_of_a_public_name(order):
    """Whatever has been imported before, `nms.verify` is the function and never a room of that
    name."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, order], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_verbs_are_called_after_a_room_was_imported():
    line = (
        "from nmsparse_deploy.prove import *; import nmsparse_deploy as nms; assert callable(nms.verify) and "
        "callable(nms.export) and callable(nms.evaluate) and callable(nms.bench)"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
