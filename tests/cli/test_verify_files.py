"""The right verdict for every file of tests/golden/verify and tests/hostile, by its name, through
the command line. Their README files say the same in words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from nmsparse_deploy.cli import app, invoke
from tests import ROOT

FOLDERS = (ROOT / "tests/hostile", ROOT / "tests/golden/verify")
HOLDS, DENSE = "holds", "dense"


@dataclass(frozen=True)
class Verdict:
    """Exit code, what is said of each weight (the first words, or words of its problem), and what
    else is said."""

    code: int
    weights: dict[str, str] = field(default_factory=dict)
    says: str = ""


BESIDE = Verdict(0, {"good": HOLDS, "w": DENSE})
LAYERS = {f"layers.{i}.fc.weight": HOLDS for i in range(6)}
VERDICTS = {
    "einsum.onnx": BESIDE,
    "fusedmatmul.onnx": BESIDE,
    "lstm.onnx": Verdict(0, {"good": HOLDS, "w": DENSE, "r": DENSE}),
    "matmulinteger.onnx": BESIDE,
    "qlinearmatmul.onnx": BESIDE,
    "runtime-scale.onnx": BESIDE,
    "scan-weights.onnx": BESIDE,
    "one-of-two-wrong.onnx": Verdict(1, {"good": HOLDS, "w": "the wrong axis"}, "the wrong axis"),
    "perm-as-int.onnx": Verdict(2, says="no list of numbers"),
    "function-bomb.onnx": Verdict(2, says="unfold to"),
    "microsoft-dq.onnx": Verdict(0, {"w": HOLDS}),
    "sparse-matmulinteger.onnx": Verdict(0, {"w": HOLDS}),
    "sibling-branches.onnx": Verdict(0, {"w": HOLDS, "w@If.then_branch": HOLDS}),
    "dense-u8-head.onnx": Verdict(0, {"g": HOLDS, "hd": DENSE}),
    "sparse24-bitmask.safetensors": Verdict(0, {"l": HOLDS}),
    "linear-wrong.safetensors": Verdict(1, {"fc.weight": "Conv1D"}, "worth nothing"),
    "linear-mixed.safetensors": Verdict(
        1, LAYERS | {"layers.3.fc.weight": "layers of one kind reduce one axis"}
    ),
}


def verify(capfd, name: str, *options: str) -> tuple[int, str, str]:
    path = next(folder / name for folder in FOLDERS if (folder / name).is_file())
    capfd.readouterr()
    code = invoke(lambda: app(["--json", "verify", str(path), *options]))
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


def said(check: dict) -> str:
    """What a row says: dense, holds, or why not."""
    if check["skipped"]:
        return check["skipped"]
    return HOLDS if check["ok"] else "; ".join(check["problems"])


@pytest.mark.parametrize("name", VERDICTS)
def test_every_file_gets_its_verdict(name, capfd):
    verdict = VERDICTS[name]
    code, out, err = verify(capfd, name)
    assert code == verdict.code, out + err
    assert verdict.says in out + err
    if verdict.weights:
        (report,) = json.loads(out)["reports"]
        rows = {check["tensor"]: said(check) for check in report["checks"]}
        assert rows.keys() == verdict.weights.keys()
        for tensor, words in verdict.weights.items():
            assert words in rows[tensor]
        assert not report["not_followed"]
        assert verify(capfd, name, "--strict")[0] == code


@pytest.mark.parametrize("name", [name for name, v in VERDICTS.items() if v.weights])
def test_expecting_a_weight_fails_unless_it_holds(name, capfd):
    for tensor, words in VERDICTS[name].weights.items():
        code, out, _ = verify(capfd, name, "--expect", tensor)
        rows = {check["tensor"]: check["ok"] for check in json.loads(out)["reports"][0]["checks"]}
        assert rows[tensor] == (words == HOLDS)
        assert words == HOLDS or code == 1


def test_every_file_has_a_verdict_here_and_a_line_in_a_readme():
    files = {
        path.name
        for folder in FOLDERS
        for path in folder.iterdir()
        if path.suffix in (".onnx", ".safetensors")
    }
    assert files == VERDICTS.keys()
    told = (ROOT / "tests/hostile/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in files)
