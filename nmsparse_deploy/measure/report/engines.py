"""Which kernels the engines run: the evidence of `engines.json`, layer by layer."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.ship.evidence import LEVELS

MEANING = {"pattern": "the stored weight is 2:4",
           "shape": "its whole fusion group is, in a shape that kernels exist for",
           "eligible": "the builder found it eligible", "chosen": "the builder chose a sparse kernel for it",
           "tactic": "the engine holds a sparse kernel for it", "observed": "that kernel was seen running",
           "counted": "the hardware counted sparse instructions"}
"""What each level of evidence says."""
SHOWN = ("node", "parameter", "k", "n", "dtype", "rung", "reason", "why_not")


def engines(stages: Stages) -> list[dict[str, Any]] | None:
    """One entry per engine with its ladder and its layers; None when none was built."""
    if stages.engines is None:
        return None
    with stages.of("engines.json"):
        return [_engine(row) for row in stages.engines["engines"]]


def _engine(row: dict[str, Any]) -> dict[str, Any]:
    found, settings, made = row["evidence"], row["settings"], row["environment"]
    shapes = "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in settings["shapes"].items())
    ladder = [{"rung": level, "meaning": MEANING[level], "layers": found["rungs"][level]["layers"],
               "flop_share": float(found["rungs"][level]["flop_share"])} for level in LEVELS]
    return {"name": row["name"], "path": row["path"], "onnx": row["onnx"], "bytes": row["bytes"],
            "seconds": row["seconds"], "sparse_weights": found["sparse_weights"], "verdict": found["verdict"],
            "gemms": found["gemms"], "flop_basis": found["flop_basis"], "ladder": ladder, "reasons": found["reasons"],
            "shapes": shapes, "route": settings.get("route"), "problems": found["problems"],
            "unplaced": found["unplaced"],
            "builder": f"TensorRT {made['tensorrt']} on {made['gpu']}, level {settings['level']}, "
                       f"{settings['timing_iterations']} timings per tactic",
            "layers": [{key: layer[key] for key in SHOWN} for layer in found["layers"]]}


def lines(engines: list[dict[str, Any]] | None) -> list[str]:
    """A sentence per engine for the terminal."""
    return [f"Engine {row['path']}: {row['verdict']}" for row in engines or []]
