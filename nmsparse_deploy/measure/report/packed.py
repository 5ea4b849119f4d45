"""Models without stored zeros: their size, what every GEMM was decided to run on, and the arms timed on a GPU."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.measure.report.stages import Stages


def packed(stages: Stages) -> list[dict[str, Any]] | None:
    """One entry per packed model; None when there is none."""
    if stages.torch is None:
        return None
    with stages.of("torch.json"):
        return [_packed(row) for row in stages.torch["artefacts"]]


def _packed(row: dict[str, Any]) -> dict[str, Any]:
    made = row["decisions"]
    facts = {key: row[key] for key in ("precision", "path", "weights", "packed_bytes", "dense_bytes", "verified")}
    if made is None:
        return {**facts, "gpu": None, "dry": False, "not_checked": row["not_checked"], "decisions": []}
    return {**facts, "gpu": made["gpu"], "dry": made["dry"], "not_checked": None,
            "decisions": [line for one in made["gemms"] for line in _lines(one)]}


def _lines(one: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for every number of rows at which a GEMM was timed."""
    shape = {"k": int(one["k"]), "n": int(one["n"]), "weights": len(one["weights"]), "keep": one["keep"],
             "why": one["why"]}
    keys = ("rows", "dense_us", "sparse_us", "speedup", "low", "high")
    return [{**shape, **{key: float(found[key]) for key in keys}, "word": found["word"]} for found in one["verdicts"]]


def gpu_arms(stages: Stages) -> dict[str, Any] | None:
    """What `bench` measured on a GPU: a line for every arm of every workload; None when nothing was."""
    data = stages.bench_gpu
    if data is None:
        return None
    with stages.of("bench-gpu.json"):
        lines = [{"work": f"{phase['name']}, {'CUDA graph' if phase['replayed'] else 'plain'}", "arm": arm["name"],
                  "median_ms": float(arm["median_ms"]), "p99_ms": float(arm["p99_ms"]),
                  "ratio": phase["over_dense"].get(arm["name"]), "pruned": phase["over_pruned"].get(arm["name"])}
                 for phase in data["phases"] for arm in phase["arms"]]
        return {"device": data["before"]["device"], "precision": data["precision"], "batch": int(data["batch"]),
                "length": int(data["length"]), "verdict": data["verdict"], "lines": lines,
                "failed": [f"{name}: {why}" for name, why in data["failed"].items()]}
