"""Options of the verbs: those of the recipe's fields, --json and --quiet in either place, one
sentence for a wrong value."""

from __future__ import annotations

import json

import pytest

from nmsparse_deploy import recipe
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.cli.app import DEMO, VERBS, command
from nmsparse_deploy.cli.options import NAMES, Asked

FIELDS = [
    (verb, group, path)
    for verb, (_, groups, _) in VERBS.items()
    for group in groups
    for path in group.paths.split()
]
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    code = invoke(lambda: app([str(a) for a in arguments]))
    out, err = capfd.readouterr()
    return code, out, err


def nodes(schema: dict, node: dict):
    """A field's JSON schema and everything that it is made of."""
    yield node
    inner = [*node.get("anyOf", []), *node.get("oneOf", []), *filter(None, [node.get("items")])]
    if "$ref" in node:
        inner.append(schema["$defs"][node["$ref"].rpartition("/")[2]])
    for part in inner:
        yield from nodes(schema, part)


def described(section: str, path: str) -> list[dict]:
    """What pydantic's own schema says about a field; once for each section that may stand there."""
    schema = getattr(recipe, section).model_json_schema()
    head, _, deeper = path.partition(".")
    node = schema["properties"][head]
    owners = [part for part in nodes(schema, node) if deeper and "properties" in part]
    fields = [
        {
            **own["properties"][deeper],
            **({"default": node["default"][deeper]} if node.get("default") else {}),
        }
        for own in owners
    ] or [node]
    return [{**field, "parts": list(nodes(schema, field))} for field in fields]


@pytest.mark.parametrize(
    "verb,group,path", FIELDS, ids=lambda value: getattr(value, "section", value)
)
def test_an_option_says_what_its_field_says(verb, group, path):
    leaf = path.rpartition(".")[2]
    flag = f"--{NAMES.get(leaf, leaf).replace('_', '-')}"
    option = next(parameter for parameter in command(verb).params if flag in parameter.opts)
    for field in described(group.section, path):
        default = field["default"]
        assert option.default == (list(default) if isinstance(default, (list, dict)) else default)
        assert option.help.startswith(group.note + field["description"])
        choices = [str(value) for part in field["parts"] for value in part.get("enum", [])]
        assert not choices or option.metavar == f"<{'|'.join(choices)}>"
        plain = [part for part in field["parts"] if "properties" not in part]
        assert all(
            f"{part[bound]:g}" in option.help for part in plain for bound in BOUNDS if bound in part
        )


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_is_written_by_hand_that_a_field_has(verb):
    function, groups, _ = VERBS[verb]
    names = {NAMES.get(field, field) for group in groups for field in group.model.model_fields}
    assert not names & set(function.__annotations__)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help_and_shows_its_default(verb):
    for parameter in command(verb).params:
        assert parameter.help and parameter.show_default, parameter.name


def test_the_demo_model_is_the_default_of_a_recipe():
    assert DEMO == recipe.DEFAULT_MODEL


def test_what_is_left_out_is_the_recipe_s():
    """A section within a section starts from its default there: a plan's calibration is not that of
    `prune`."""
    groups = VERBS["plan"][1]
    spec = Asked(groups, {"budget": 0.5, "samples": 4}).read(recipe.Allocate)
    assert (spec.calibration.samples, spec.calibration.length) == (
        4,
        recipe.Allocate(budget=0.5).calibration.length,
    )
    groups = VERBS["prune"][1]
    assert Asked(groups, {}).read(recipe.Prune) == recipe.Prune()
    spec = Asked(groups, {"method": "maskllm", "steps": 7, "refine": ["refit"]}).read(recipe.Prune)
    assert (spec.learn.steps, spec.learn.objective, spec.refine) == (7, "auto", (recipe.Refit(),))


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (
            ["prune", "--samples", "-1"],
            "--samples (calibration.samples): Input should be greater than or equal to 0",
        ),
        (["prune", "--wbits", "5"], "--wbits (wbits): Input should be 4 or 8"),
        (
            ["prune", "--method", "maskllm", "--objective", "half"],
            "--objective (learn.maskllm.objective): Input should be 'auto'",
        ),
        (["prune", "--plan", "p.yaml", "--pattern", "2:4"], "--plan decides the pattern"),
        (["plan", "--budget", "2"], "--budget (budget): Input should be less than or equal to 1"),
        (
            ["bench", "--rounds", "1"],
            "--rounds (rounds): Input should be greater than or equal to 3",
        ),
        (["build", "--precision", "int3"], "--precision (precision): Input should be 'fp32'"),
        (["build", "--shape", "nonsense"], "'nonsense' is no shape"),
        (
            ["evaluate", "--protocol", "bbc"],
            "--protocol (protocols.0): Input should be 'wikitext2'",
        ),
        (["evaluate", "--paper-context", "1"], "--paper-context (paper_context): Input should be"),
        (["bench", "--device", "tpu"], "There is no device 'tpu'"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_option(
    arguments, sentence, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, *arguments)
    assert code == 2 and sentence in err and "Traceback" not in err and out == ""
    assert not list(tmp_path.iterdir())


ARGUMENTS = {
    "inspect": ["./nowhere"],
    "plan": ["./nowhere", "--budget", "0.5"],
    "prune": ["./nowhere"],
    "import": ["./nowhere"],
    "crossover": ["./nowhere"],
    "verify": ["nowhere"],
    "export": [],
    "build": [],
    "evaluate": [],
    "bench": ["--device", "cpu"],
    "report": [],
    "compare": ["nonsense"],
    "run": ["nowhere.yaml"],
    "demo": ["--model", "./nowhere"],
    "doctor": [],
    "proof": [],
    "list": [],
}
"""A call of every verb that is soon over in an empty folder."""


@pytest.mark.parametrize("verb", VERBS)
def test_json_and_quiet_stand_before_or_after_the_verb(verb, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ARGUMENTS[verb]
    before, after = run(capfd, "--json", verb, *arguments), run(capfd, verb, *arguments, "--json")
    assert before[0] == after[0] and json.loads(before[1]).keys() == json.loads(after[1]).keys()
    for quiet in (
        ["--quiet", verb, *arguments],
        [verb, "--quiet", *arguments],
        [verb, *arguments, "-q"],
    ):
        code, out, err = run(capfd, *quiet)
        assert code == before[0] and out == "" and err.startswith("Error: " if code else "")
        assert len(err.splitlines()) <= 2
    assert run(capfd, verb, *arguments)[1] == "" or verb in (
        "doctor",
        "list",
    )  # neither option outlives its call
