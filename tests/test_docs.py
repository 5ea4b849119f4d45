"""What README, docs and the other pages name is there: commands and their options, files of the
repository."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest
from typer.main import get_command

from nmsparse_deploy.cli.app import app, command
from tests import ROOT

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
]
CODE = re.compile(r"```\w*\n(.*?)```|`([^`\n]+)`", re.S)
CALL = re.compile(r"(?:^|\s)(?:nmsparse-deploy|-m nmsparse_deploy)\s+([^#|&;]+)")
FILE = re.compile(
    r"(?<![\w/.-])(?:nmsparse_deploy|tests|benchmarks|recipes|examples|docs|constraints)/[\w./-]*\.\w+\b"
)
TOP = get_command(app)


def options(command):
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}


def calls(page):
    """The words of every call of the program in a page's code."""
    for fenced, inline in CODE.findall(page.read_text()):
        for line in re.sub(r"\\\n\s*", " ", fenced or inline).splitlines():
            if found := CALL.search(line):
                yield shlex.split(found[1])


def test_the_calls_of_a_page_are_found():
    assert len(list(calls(ROOT / "docs/guide.md"))) > 20


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "cli.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_and_options_exist(page):
    for words in calls(page):
        known = options(TOP)
        verb = next((word for word in words if not word.startswith("-")), "VERB")
        if verb != "VERB":
            assert verb in TOP.commands, f"there is no command {verb}"
            known |= options(command(verb))
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {
            "-cask:sparsity"
        }
        assert given <= known, f"{verb} has no {given - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_exist(page):
    named = {name for name in FILE.findall(page.read_text()) if "NAME" not in name}
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_python_code_imports_exists(page):
    for module, names in re.findall(
        r"from (nmsparse_deploy[\w.]*) import ([\w, ]+)", page.read_text()
    ):
        assert not [name for name in names.split(", ") if not hasattr(import_module(module), name)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent != ROOT / "docs"], ids=lambda path: path.name
)
def test_links_outside_of_the_site_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
