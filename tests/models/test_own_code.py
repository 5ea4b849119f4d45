"""Code that comes with a model is never run: not when its files ask for it, and not when somebody
types `y`."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmsparse_deploy.cli import app, invoke
from tests.fixtures import pico, zoo

MODEL = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CONFIG = {"AutoConfig": "configuration_own.OwnConfig"}
TOKENIZER = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
FILES = (
    "configuration_own.py",
    "modeling_own.py",
    "tokenization_own.py",
    "custom_generate/generate.py",
    "own.py",
)


def change(file: Path, **entries: object) -> None:
    """Change entries of a JSON file; None takes one away."""
    settings = (json.loads(file.read_text()) if file.is_file() else {}) | entries
    file.write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )


@pytest.fixture
def witness(tmp_path) -> Path:
    return tmp_path / "witness"


@pytest.fixture
def folder(tmp_path, witness) -> Path:
    """A pico model among files of Python that leave a witness when they are run."""
    place = pico.save(pico.llama(), tmp_path / "model")
    for name in FILES:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(
            f"open({str(witness)!r}, 'a').write(__name__)\n"
            "class OwnConfig: pass\nclass OwnForCausalLM: pass\nclass OwnTokenizer: pass\n"
            "def generate(*args, **kwargs): pass\n"
        )
    return place


COMMANDS = {
    "inspect": ["inspect"],
    "inspect --json": ["--json", "inspect"],
    "prune": ["prune", "--method", "magnitude"],
    "inspect --cost": ["inspect", "--cost"],
}


@pytest.fixture(params=COMMANDS)
def typed(request, tmp_path, monkeypatch, capfd):
    """Type a command, then `y` for whatever is asked; the exit code, and what was written to stdout
    and stderr."""

    def run(source: Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        words = [*COMMANDS[request.param], str(source)]
        out = ["--out", str(tmp_path / "run")] if request.param == "prune" else []
        code = invoke(lambda: app([*words, *out]))
        captured = capfd.readouterr()
        if request.param.endswith("--json") and captured.out:
            json.loads(captured.out)
        return code, captured.out, " ".join(captured.err.split())

    return run


def refused(typed, source: Path, file: str, witness: Path) -> None:
    code, out, err = typed(source)
    assert (
        code == 2
        and (out == "" or json.loads(out)["exit_code"] == 2)
        and f"'{file}'" in err
        and "never run" in err
    ), (code, out, err)
    assert "Traceback" not in err and not witness.exists() and not (source.parent / "run").exists()


@pytest.mark.parametrize(
    "entries, file",
    [
        ({"model_type": "own", "auto_map": CONFIG | MODEL}, "configuration_own.py"),
        ({"model_type": "own", "architectures": None, "auto_map": CONFIG}, "configuration_own.py"),
        ({"architectures": ["OwnForCausalLM"], "auto_map": CONFIG | MODEL}, "modeling_own.py"),
        (
            {
                "architectures": ["OwnForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "some/one--modeling_own.Own"},
            },
            "some/one/modeling_own.py",
        ),
    ],
)
def test_an_architecture_that_only_the_folder_has_is_refused(entries, file, folder, typed, witness):
    change(folder / "config.json", **entries)
    refused(typed, folder, file, witness)


@pytest.mark.parametrize("form", [TOKENIZER, TOKENIZER["AutoTokenizer"]])
def test_a_tokenizer_that_only_the_folder_has_is_refused(form, folder, typed, witness):
    """The library has a tokenizer for each model that it knows, so only a model that it was taught
    has none."""
    zoo.FAMILIES["Baichuan-style"].build(folder)
    change(folder / "tokenizer_config.json", auto_map=form, tokenizer_class="OwnTokenizer")
    refused(typed, folder, "tokenization_own.py", witness)


def test_the_library_s_own_code_loads_a_known_architecture(folder, typed, witness, tmp_path):
    change(folder / "config.json", auto_map=CONFIG | MODEL)
    change(folder / "tokenizer_config.json", auto_map=TOKENIZER)
    change(folder / "generation_config.json", custom_generate="custom_generate")
    code, out, err = typed(folder)
    assert code == 0 and "[y/N]" not in out + err and not witness.exists()
    saved = tmp_path / "run/model"
    if saved.exists():  # it comes without the code, so it must not ask for it
        assert not any("auto_map" in file.read_text() for file in saved.glob("*.json"))
        AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
class TestDiffusers:
    @pytest.fixture
    def whole(self, tmp_path, witness) -> Path:
        """A pipeline with a witness in each of its folders."""
        place = tmp_path / "pipeline"
        zoo.FAMILIES["DiT"].build(place / "transformer")
        (place / "model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": ["pipeline", "OwnPipeline"],
                    "transformer": ["own", "OwnTransformer"],
                }
            )
        )
        for name in ("pipeline.py", "transformer/own.py", "transformer/scheduler/own.py"):
            (place / name).write_text(
                f"open({str(witness)!r}, 'a').write(__name__)\nclass OwnTransformer: pass\n"
            )
        return place

    @pytest.mark.parametrize(
        "entries",
        [
            {"_class_name": ["own", "OwnTransformer"]},
            {"_class_name": "OwnTransformer"},
            {"_class_name": "AutoModel", "auto_map": {"AutoModel": "own.OwnTransformer"}},
        ],
    )
    def test_a_transformer_that_only_the_folder_has_is_refused(
        self, entries, whole, typed, witness
    ):
        change(whole / "transformer/config.json", **entries)
        refused(typed, whole, "own.py", witness)

    @pytest.mark.parametrize("name", [["own", "OwnTransformer"], "DiffusionPipeline", "AutoModel"])
    def test_a_scheduler_that_is_none_of_the_library_s_is_refused(
        self, name, whole, typed, witness
    ):
        change(whole / "transformer/scheduler/scheduler_config.json", _class_name=name)
        refused(typed, whole, "own.py", witness)

    def test_a_known_transformer_is_pruned_without_the_pipeline_s_code(self, whole, typed, witness):
        code, _, err = typed(whole)
        assert not witness.exists() and code == 0, err
