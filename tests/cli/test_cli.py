"""The command line: exit codes, JSON, sentences, and nothing heavy before it is needed."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.registry import METHODS, REFINEMENTS
from tests.fixtures import pico


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process, as the entry point does; exit code, stdout, stderr."""
    code = invoke(lambda: app([str(a) for a in arguments]))
    out, err = capfd.readouterr()
    return code, out, err


def small(texts) -> list[str]:
    return ["--data", str(texts["calibration"]), "--samples", "6", "--length", "32"]


@pytest.fixture(scope="module")
def pruned(llama_dir, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert (
        invoke(lambda: app(["--quiet", "prune", str(llama_dir), *small(texts), "--out", str(out)]))
        == 0
    )
    return out


def test_the_whole_job(pruned, texts, capfd):
    code, out, _ = run(capfd, "--json", "verify", pruned)
    report = json.loads(out)
    assert (
        code == 0
        and report["ok"]
        and report["reports"][0]["checked"] == 14
        and report["not_checked"]
    )
    code, out, _ = run(
        capfd,
        "--json",
        "evaluate",
        pruned,
        "--data",
        texts["held_out"],
        "--tokens",
        256,
        "--context",
        64,
        "--continuation",
        4,
    )
    results = json.loads(out)["results"]
    assert (
        code == 0
        and results["dense"]["protocol"]["windows"] == results["pruned"]["protocol"]["windows"]
    )
    code, out, _ = run(capfd, "export", pruned, "--precision", "fp32")
    assert (
        code == 0
        and "14 weights linked and verified" in out
        and "pruning saves nothing here" in out
    )
    code, out, _ = run(capfd, "--json", "bench", pruned, "--rounds", 3, "--length", 16)
    bench = json.loads(out)
    assert code == 0 and {arm["name"] for arm in bench["arms"]} == {
        "dense",
        "pruned",
        "pruned, ONNX fp32",
    }
    assert "No CPU kernel here uses 2:4" in bench["verdict"]
    assert list(bench["ratios"]) == ["pruned"]  # the ONNX arm has no dense twin on the same kernels
    code, out, _ = run(capfd, "--json", "verify", pruned)
    assert code == 0 and [r["place"] for r in json.loads(out)["reports"]] == ["file", "onnx"]
    code, out, _ = run(capfd, "report", pruned)
    assert code == 0 and Path(out.strip()).is_file()


def test_damage_is_exit_code_1(pruned, tmp_path, capfd):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(pruned, broken)
    state = load_file(broken / "model" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 8:12] = 1.0
    save_file(state, broken / "model" / "model.safetensors", {"format": "pt"})
    code, out, _ = run(capfd, "--json", "verify", broken)
    assert code == 1 and json.loads(out)["ok"] is False  # one document, not the error after it
    code, out, err = run(capfd, "verify", broken)
    assert code == 1 and "down_proj" in err and "1 of" in out + err


def test_masks_of_another_model(pruned, texts, tmp_path, capfd):
    """Another architecture's masks and another checkpoint's masks both fail, with the tensor
    named."""
    import shutil

    for name, module in {"gpt2": pico.gpt2(), "other": pico.llama(seed=9)}.items():
        source = pico.save(module, tmp_path / name)
        run(capfd, "prune", source, "--method", "magnitude", "--out", tmp_path / f"{name}-run")
        mixed = tmp_path / f"{name}-mixed"
        shutil.copytree(pruned, mixed)
        shutil.copy(tmp_path / f"{name}-run" / "masks.safetensors", mixed)
        code, _, err = run(capfd, "verify", mixed)
        assert code == 1 and ".weight'" in err


def test_foreign_files(pruned, llama_dir, capfd):
    file = pruned / "model" / "model.safetensors"
    code, out, _ = run(capfd, "verify", file)
    assert code == 0 and "model.layers.0.mlp.up_proj.weight: 2:4 along axis 1" in out
    code, _, err = run(capfd, "verify", llama_dir)
    assert code == 1 and "sparse" in err
    code, _, err = run(capfd, "verify", file, "--expect", "*lm_head*")
    assert code == 1 and "lm_head" in err
    code, _, err = run(capfd, "verify", pruned, "--expect", "*")
    assert code == 2
    assert run(capfd, "verify", "thing.engine")[0] == 2


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["prune", "--method", "sparsegtp"], "Did you mean 'sparsegpt'?"),
        (["prune", "--pattern", "4:2"], "not a pattern"),
        (["prune", "--refine", "refits"], "Did you mean 'refit'?"),
        (["prune", "--pattern", "two"], "not a pattern"),
        (["prune", "--samples", "-3"], "calibration.samples"),
        (["prune", "./nowhere"], "There is no model './nowhere'"),
        (["verify", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "not a run folder"),
        (["export", "nowhere", "--precision", "fp12"], "not a run folder"),
        (["run", "nowhere.yaml"], "There is no recipe"),
    ],
)
def test_usage_errors_are_exit_code_2(arguments, sentence, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, *arguments)
    assert code == 2 and sentence in err and "Traceback" not in err and out == ""
    assert not list(tmp_path.iterdir())


def test_unknown_options_and_commands_are_exit_code_2(capfd):
    assert run(capfd, "prune", "--nonsense")[0] == 2
    assert run(capfd, "nonsense")[0] == 2
    assert run(capfd, "--help")[0] == 0


def test_errors_are_json_too(capfd):
    code, out, err = run(capfd, "--json", "evaluate", "nowhere")
    assert json.loads(out)["exit_code"] == code == 2 and "not a run folder" in err


def test_list_names_everything_with_its_source(capfd):
    code, out, _ = run(capfd, "--json", "list")
    listed = json.loads(out)
    assert code == 0 and [row["name"] for row in listed["methods"]] == METHODS.names()
    assert [row["name"] for row in listed["refinements"]] == REFINEMENTS.names()
    assert all(
        re.search(r"\d{4}", row["source"]) for row in listed["methods"] + listed["refinements"]
    )


def test_inspect_says_why_not(llama_dir, capfd):
    code, out, _ = run(capfd, "inspect", llama_dir, "--exclude", "*k_proj*")
    assert (
        code == 0
        and "embedding table" in out
        and "reads the same input as" in out
        and "8 of 14" in out
    )


def test_no_such_hub_model(capfd):
    code, _, err = run(capfd, "prune", "nobody/nothing")
    assert code == 1 and "hub cannot be reached" in err


def test_help_is_fast_and_light():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "-m", "nmsparse_deploy", "--help"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and "prune" in shown.stdout
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    )  # the benchmark says how fast
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, nmsparse_deploy.cli; print(*sys.modules)"],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "nmsparse_deploy.cli" in loaded
    assert not {"torch", "numpy", "transformers", "pydantic", "onnx"} & set(loaded)


def test_the_api_has_verbs_and_not_their_modules():
    """Importing a submodule must not put it in the place of the function of the same name."""
    script = "import nmsparse_deploy as nms; nms.prune; print(*(n for n in nms.__all__ if not callable(getattr(nms, n))))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.strip() == "", shown.stdout + shown.stderr


def test_ctrl_c_keeps_finished_blocks(llama_dir, texts, tmp_path):
    """A real SIGINT while pruning: one sentence, no traceback, exit code 1, and the run can be
    resumed."""
    command = [
        sys.executable,
        "-m",
        "nmsparse_deploy",
        "prune",
        str(llama_dir),
        *small(texts),
        "--out",
        "run",
    ]
    script = f"""
import os, signal, sys
import nmsparse_deploy.find.prune
prune = sys.modules["nmsparse_deploy.find.prune"]
original = prune._Stage._commit
def slow(self, name, pruned):
    if pruned.number == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return original(self, name, pruned)
prune._Stage._commit = slow
sys.argv = {command[2:]!r}
from nmsparse_deploy.cli import main
main()
"""
    stopped = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert (
        stopped.returncode == 1
        and "Interrupted" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert (tmp_path / "run" / "blocks" / "000.safetensors").is_file()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_full_disk(llama_dir, texts, tmp_path):
    """A file-size limit makes real writes fail: one sentence, exit code 1, nothing half-written."""
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv = ["nmsparse-deploy", "prune", {str(llama_dir)!r}, *{small(texts)!r}, "--out", "run"]
from nmsparse_deploy.cli import main
main()
"""
    full = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert (
        full.returncode == 1
        and "disk is full" in full.stderr.lower()
        and "Traceback" not in full.stderr
    ), full.stderr
    left = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    assert {f.name for f in left} <= {"manifest.json", "plan.json", ".lock"}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"] == {}


def test_read_only_place(llama_dir, texts, capfd):
    code, _, err = run(capfd, "prune", llama_dir, *small(texts), "--out", "/sys/nmsparse-run")
    assert code == 1 and "No permission" in err


def test_the_dense_twin_is_the_model_that_was_pruned(texts, tmp_path, capfd):
    """When the dense checkpoint has changed since, comparing with it would be a lie."""
    source = pico.save(pico.llama(), tmp_path / "model")
    run(capfd, "prune", source, *small(texts), "--out", tmp_path / "run")
    pico.save(pico.llama(seed=5), source)
    code, _, err = run(
        capfd,
        "evaluate",
        tmp_path / "run",
        "--data",
        texts["held_out"],
        "--tokens",
        64,
        "--context",
        64,
    )
    assert code == 1 and "another model" in err


def test_a_recipe_redoes_only_what_changed(llama_dir, texts, tmp_path, capfd):
    recipe = tmp_path / "r.yaml"

    def write(tokens: int) -> None:
        recipe.write_text(f"""
model: {llama_dir}
prune: {{method: wanda, calibration: {{data: {texts["calibration"]}, samples: 4, length: 32}}}}
export: null
evaluate: {{data: {texts["held_out"]}, tokens: {tokens}, context: 64, continuation: 0}}
bench: null
""")

    write(128)
    code, out, _ = run(capfd, "run", recipe, "--out", tmp_path / "run")
    assert code == 0 and "report" in out
    first = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert run(capfd, "run", recipe, "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"] == first
    write(256)
    assert run(capfd, "run", recipe, "--out", tmp_path / "run")[0] == 0
    again = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert again["prune"] == first["prune"] and again["evaluate"]["spec"]["tokens"] == 256
    assert run(capfd, "run", recipe, "--dry-run")[0] == 0
