"""One family through every column of the support table."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy import models, pipeline
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models.discover import discover
from nmsparse_deploy.prune import prune
from nmsparse_deploy.recipe import Export, Prune, validate
from nmsparse_deploy.rundir import RunDir
from tests.zoo import FAMILIES

COLUMNS = ("discover", "wanda", "sparsegpt", "maskllm", "verify", "export", "agreement", "reload")
YES = "yes"
LEARN = {"steps": 2, "evaluate_every": 2, "priors": ["magnitude"], "objective": "block"}
"""Enough steps to go through the whole machinery in every block."""
HALF_PRECISION = 0.02
"""Relative difference that fp16 arithmetic may make to a random two-block model."""


def check(name: str, folder: Path, data: dict[str, Path]) -> dict[str, Any]:
    """Column -> `yes`, or why it failed. A column whose forerunner failed says so."""
    family, row, start = FAMILIES[name], {}, time.perf_counter()
    family.build(folder / "model")
    source = str(folder / "inputs.safetensors" if family.data == "prepared" else data[family.data])
    if family.data == "prepared":
        (folder / "model/inputs.safetensors").rename(source)
    runs: dict[str, RunDir] = {}

    def pruned(method: str) -> None:
        runs[method] = prune(str(folder / "model"), spec(method, source), folder / method)

    row["discover"] = _try(lambda: _discovered(str(folder / "model")))
    row["wanda"] = _try(lambda: pruned("wanda"))
    row["sparsegpt"] = _try(lambda: pruned("sparsegpt"))
    row["maskllm"] = _try(lambda: pruned("maskllm"))
    run = runs.get("wanda")
    after: dict[str, Callable[[], Any]] = {
        "verify": lambda: [_holds(report) for report in pipeline.verify(run)],
        "export": lambda: pipeline.export(run, Export(precisions=("fp16",))),
        "agreement": lambda: _agrees(run.read_json("export.json")["files"][0]["agreement"]),
        "reload": lambda: _reloads(folder, run)}
    for column, work in after.items():
        row[column] = _try(work) if run else "not pruned"
        if column == "agreement" and row["export"] != YES:
            row[column] = "not exported"
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def spec(method: str, data: str) -> Prune:
    calibration = {"data": data, "samples": 8, "length": 32, "batch": 4}
    learn = {"learn": LEARN} if method == "maskllm" else {}
    return validate(Prune, {"method": method, "calibration": calibration, "compute": "fp32", **learn})


def _try(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:  # the table says what failed
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        expected = isinstance(error, (AssertionError, NmsparseError))
        return (line if expected else f"{type(error).__name__}: {line}")[:200]
    return YES


def _discovered(folder: str) -> None:
    loaded = models.load(folder)
    found = discover(loaded.module, models.sample_inputs(loaded))
    assert len(found.blocks) > 1, "fewer than two blocks"
    assert {target.block for target in found.targets} == set(range(len(found.blocks))), "a block without a target"
    idle = [s.name for s in found.skipped if "not used" in s.reason or "did not run" in s.reason]
    assert not idle, f"'{idle[0]}' was not seen in a forward pass"


def _holds(report: Any) -> None:
    assert report.ok and report.checked, report.summary()


def _agrees(found: dict[str, Any]) -> None:
    assert "not_checked" not in found, found["not_checked"]
    assert found["relative"] < HALF_PRECISION, f"relative difference {found['relative']:.3g}"


@torch.no_grad()
def _reloads(folder: Path, run: RunDir) -> None:
    """The saved model, loaded by its own library, computes bit for bit what the masked dense model computes."""
    dense = models.load(str(folder / "model"))
    masks = MaskSet.load(run / "masks.safetensors").masks
    for name, mask in masks.items():
        parameter = dense.module.get_parameter(name)
        parameter.copy_(mask.apply(parameter))
    inputs = models.sample_inputs(dense)
    stock = _stock(run / "model", dense)
    wanted, got = dense.module(**inputs), stock(**inputs)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(wanted, got), "other outputs"
        return
    for field in ("logits", "last_hidden_state", "sample"):
        if getattr(wanted, field, None) is not None:
            assert torch.equal(getattr(wanted, field), getattr(got, field)), f"other {field}"
            return
    raise AssertionError("nothing to compare")


def _stock(folder: Path, dense: models.LoadedModel) -> torch.nn.Module:
    if dense.library == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return type(dense.module).from_pretrained(folder).eval()
