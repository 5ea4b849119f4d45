"""The registry of runtimes: each is whole, and a new one is a class and a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import Field

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.measure.bench.model_arms import Job
from nmsparse_deploy.measure.bench.stages import bench_run
from nmsparse_deploy.measure.report.build import build_report
from nmsparse_deploy.recipe import Bench, Build, validate
from nmsparse_deploy.registry import ENGINES, RegistryEntry
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import Engine, EngineSettings, Inspection, settings_of
from nmsparse_deploy.ship.torch_sparse.semi_structured import StandIn, standing_in
from nmsparse_deploy.system.gpu_clock import dry_machine


class ReferenceSettings(EngineSettings):
    verbose: int = Field(0, ge=0, description="how much it prints")


class Reference(Engine):
    """ONNX's own evaluator, which computes with NumPy."""

    name, title, label = "reference", "ONNX's reference", "reference"
    settings_type = ReferenceSettings

    def __init__(self, graph) -> None:
        self.graph = graph

    @classmethod
    def build(cls, artefact, settings=None):
        from onnx.reference import ReferenceEvaluator

        return cls(
            ReferenceEvaluator(
                str(artefact), verbose=settings_of(cls, ReferenceSettings, settings).verbose
            )
        )

    def inspect(self) -> Inspection:
        return Inspection(
            self.name,
            np.__version__,
            False,
            "NumPy multiplies the zeros",
            {"nodes": len(self.graph.rt_nodes_)},
        )

    def run(self, batch):
        outputs = self.graph.run(None, {name: np.asarray(value) for name, value in batch.items()})
        return dict(zip(self.graph.output_names, outputs))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(
        ENGINES.own,
        "reference",
        RegistryEntry(code=f"{__name__}:Reference", summary="computes with NumPy"),
    )


@pytest.fixture(scope="module")
def pruned(llama_dir, tmp_path_factory) -> Path:
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("engines") / "run"
    assert (
        invoke(
            lambda: app(
                ["--quiet", "prune", str(llama_dir), "--method", "magnitude", "--out", str(out)]
            )
        )
        == 0
    )
    assert invoke(lambda: app(["--quiet", "export", str(out), "--precision", "fp32"])) == 0
    return out


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    code = invoke(lambda: app([str(a) for a in arguments]))
    out, err = capfd.readouterr()
    return code, out, err


def test_a_new_runtime_is_built_inspected_run_benched_and_shown(registered, pruned, capfd):
    code, out, _ = run(
        capfd,
        "build",
        pruned,
        "--engine",
        "reference",
        "--precision",
        "fp32",
        "--length",
        12,
        "--option",
        "verbose=0",
        "--json",
    )
    (row,) = json.loads(out)["engines"]
    assert code == 0 and row["engine"] == "reference" and row["settings"] == {"verbose": 0}
    assert row["agreement"]["max_abs"] < 1e-3 and row["agreement"]["argmax_share"] == 1
    assert (
        row["evidence"]["verdict"] == "No sparse kernel runs: NumPy multiplies the zeros."
        and row["evidence"]["facts"]["nodes"] > 10
    )
    assert RunDir(pruned).read_json("engines.json")["engines"] == [row]

    code, out, _ = run(
        capfd,
        "bench",
        pruned,
        "--engine",
        "reference",
        "--rounds",
        3,
        "--length",
        12,
        "--device",
        "cpu",
        "--json",
    )
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert code == 0 and arms["pruned, reference fp32"]["kernel"] == "ONNX's reference CPU"

    code, out, _ = run(capfd, "report", pruned)
    page, text = Path(out.strip()).read_text(), (pruned / "report/report.md").read_text()
    for view in (page.replace("&#39;", "'"), text.replace("\\", "")):
        assert (
            "ONNX's reference: onnx/fp32/model.onnx" in view
            and "NumPy multiplies the zeros" in view
        )
        assert "pruned, reference fp32" in view
    lines = json.loads((pruned / "report/report.json").read_text())["headline"]["lines"]
    assert any(
        line.startswith("Engine onnx/fp32/model.onnx: No sparse kernel runs") for line in lines
    )
    assert "--engine reference" in run(capfd, "list")[1]


def test_a_runtime_is_timed_beside_the_arms_of_a_gpu(registered, pruned):
    with standing_in(StandIn()):
        result = bench_run(RunDir(pruned), Job(1, 12, "fp16", 5, "reference"), dry_machine())
        build_report(RunDir(pruned))
        assert "reference fp32, plain" in (pruned / "report/report.md").read_text()
        without = bench_run(RunDir(pruned), Job(1, 12, "fp16", 5, "torch-sparse"), dry_machine())
    assert [phase.name for phase in result.phases] == [
        "prefill",
        "decode",
        "reference fp32",
    ] and not result.failed
    assert [arm.kernel for arm in result.phases[-1].arms] == ["ONNX's reference"] and result.phases[
        -1
    ].over_pruned == {}
    assert [phase.name for phase in without.phases] == ["prefill", "decode"]


def test_what_a_runtime_cannot_do_is_one_sentence(registered, pruned, capfd):
    for arguments, words in (
        (
            ["build", "--engine", "reference", "--precision", "fp16"],
            "holds nothing in fp16 that ONNX's reference runs",
        ),
        (
            ["build", "--engine", "reference", "--precision", "fp32", "--level", "5"],
            "has no setting 'level'",
        ),
        (
            ["build", "--engine", "reference", "--precision", "fp32", "--option", "speed=1"],
            "has no setting 'speed'; it has verbose",
        ),
        (
            ["build", "--engine", "reference", "--precision", "fp32", "--option", "verbose=loud"],
            "verbose",
        ),
        (["build", "--engine", "onnxruntme"], "Did you mean 'onnxruntime'"),
        (["build", "--option", "level"], "no option"),
        (
            ["bench", "--engine", "torch-sparse", "--device", "cpu", "--rounds", "3"],
            "holds nothing that PyTorch with sparse kernels runs",
        ),
    ):
        code, out, err = run(capfd, arguments[0], pruned, *arguments[1:])
        assert code == 2 and words in err and not out and "Traceback" not in err, (arguments, err)


def test_onnx_runtime_is_built_like_any_other(pruned, capfd):
    pytest.importorskip("onnxruntime")
    code, out, _ = run(
        capfd,
        "build",
        pruned,
        "--engine",
        "onnxruntime",
        "--precision",
        "fp32",
        "--option",
        "threads=1",
        "--json",
    )
    (row,) = json.loads(out)["engines"]
    assert code == 0 and row["settings"]["threads"] == 1 and row["agreement"]["max_abs"] < 1e-3
    assert (
        "ONNX Runtime: onnx/fp32/model.onnx"
        in Path(run(capfd, "report", pruned)[1].strip()).read_text()
    )


@pytest.mark.parametrize("name", ENGINES.names())
def test_every_registered_runtime_is_whole(name):
    engine = ENGINES.load(name)
    assert Engine in engine.__mro__ and engine.name == name and engine.title and engine.label
    assert issubclass(engine.settings_type, EngineSettings) and engine.settings_type()
    assert all(field.description for field in engine.settings_type.model_fields.values())
    assert ENGINES[name].summary and set(engine.twins) == set(engine.twins) - set(
        engine.twins.values()
    )
    with pytest.raises(UsageError, match="has no setting 'nonsense'"):
        settings_of(engine, engine.settings_type, {"nonsense": 1})


def test_a_recipe_names_its_runtime():
    assert validate(Build, {}).engine == "tensorrt" and validate(Bench, {}).engine == "onnxruntime"
    with pytest.raises(UsageError, match="Did you mean 'tensorrt'"):
        validate(Build, {"engine": "tensorr"})
