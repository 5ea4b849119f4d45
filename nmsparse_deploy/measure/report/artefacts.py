"""What lies on disk and how fast it answered: sizes, exported graphs, latency arms, and all of it in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmsparse_deploy.measure.report.stages import Stages

DENSE_STORED = ("The zeros are stored like any other value, so the pruned weights take as much space as before; only a "
                "runtime that packs the pattern makes them smaller.")

OTHER_RUNTIME = ("Arms marked 'other runtime' do not run where the dense arm runs, and their dense twins were not "
                 "timed: their ratios compare runtimes and say nothing about pruning.")


def sizes(stages: Stages) -> dict[str, Any]:
    """Bytes of every artefact of the run."""
    rows = [{"artefact": "model/ (weights, zeros stored)", "bytes": _weights(stages.path / "model")},
            {"artefact": "masks.safetensors (one bit per weight)", "bytes": _file(stages.path / "masks.safetensors")}]
    with stages.of("export.json"):
        for row in _exports(stages):
            rows.append({"artefact": f"ONNX {row['precision']} (zeros stored)", "bytes": sum(row["files"].values())})
            rows.append({"artefact": f"dense weights at {row['precision']}, for comparison",
                         "bytes": row["dense_bytes"]})
    return {"rows": [row for row in rows if row["bytes"] is not None], "model_bytes": rows[0]["bytes"],
            "masks_bytes": rows[1]["bytes"], "note": DENSE_STORED}


def _weights(folder: Path) -> int | None:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files) if files else None


def _file(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _exports(stages: Stages) -> list[dict[str, Any]]:
    return stages.export["files"] if stages.export else []


def graphs(stages: Stages) -> list[dict[str, Any]] | None:
    """Exported graphs with their agreement with the model; None when nothing was exported."""
    if stages.export is None:
        return None
    keys = ("path", "precision", "opset", "files", "links", "dense_bytes", "seconds", "size_note", "dynamic")
    with stages.of("export.json"):
        return [{**{key: row.get(key) for key in keys}, "bytes": sum(row["files"].values()),
                 "agreement": row.get("agreement"), "warnings": row.get("warnings") or [],
                 "notes": _notes(row)} for row in _exports(stages)]


def _notes(row: dict[str, Any]) -> list[str]:
    """What was done to a graph beside tracing it, and what TensorRT-RTX made of it."""
    notes = []
    if row.get("quantisation"):
        done = row["quantisation"]
        notes.append(f"{done['gemms']} GEMMs multiply {row['precision']} numbers, weight scales per {done['scales']}; "
                     f"{done['requantised']} write 8 bits; {done['vanished']} small weights became zero.")
    if row.get("cached"):
        same = row["cached"]["agreement"]
        gap = f"by {same['max_abs']:.2g} at most" if "max_abs" in same else f"(not run: {same['not_checked']})"
        graphs = " and ".join(row["cached"]["graphs"])
        notes.append(f"{graphs} share the weights; reading a text step by step differs from one pass {gap}.")
    notes += [f"{name}: {told}" for name, found in (row.get("tensorrt_rtx") or {}).items()
              if (told := found.get("summary") or found.get("refused"))]
    return notes


def latency(stages: Stages) -> dict[str, Any] | None:
    """Timed arms with their ratio to dense, and what may be concluded; None when nothing was timed."""
    data = stages.bench
    if data is None:
        return None
    keys = ("name", "kernel", "median_ms", "p10_ms", "p90_ms", "calls")
    with stages.of("bench.json"):
        arms = [{**{key: arm[key] for key in keys}, "ratio": data["ratios"].get(arm["name"])} for arm in data["arms"]]
        base = next((arm["kernel"] for arm in arms if arm["ratio"] is None), None)
        for arm in arms:
            arm["other_runtime"] = arm["ratio"] is not None and arm["kernel"] != base
        return {"where": data["where"], "shape": data["shape"], "arms": arms, "verdict": data["verdict"],
                "predicted": [_prediction(row) for row in data.get("predicted") or []],
                "note": OTHER_RUNTIME if any(arm["other_runtime"] for arm in arms) else None,
                "environment": data.get("environment") or {}}


def _prediction(row: dict[str, Any]) -> dict[str, Any]:
    """A bound for a GPU that was not there; it stays apart from every measurement."""
    numbers = {key: float(row[key]) for key in ("gemm_speedup", "model_speedup", "flop_share")}
    return {"gpu": str(row["gpu"]), "rows": int(row["rows"]), **numbers, "formula": row.get("formula")}


def overview(quality: dict[str, Any] | None, graphs: list[dict[str, Any]] | None, latency: dict[str, Any] | None,
             model_bytes: int | None) -> list[dict[str, Any]]:
    """One row per variant: metric, size and latency as far as each was measured. Empty with fewer than two of them."""
    if sum(part is not None for part in (quality, graphs, latency)) < 2:
        return []
    metrics: dict[str, dict[str, Any]] = {}
    for row in (quality or {}).get("rows", []):
        metrics.setdefault(row["label"], row)
    arms = {arm["name"]: arm for arm in (latency or {}).get("arms", [])}
    files = {f"pruned, ONNX {graph['precision']}": graph["bytes"] for graph in graphs or []}
    bytes_of = {"pruned": model_bytes, **files}
    names = list(dict.fromkeys([*metrics, *files, *arms]))
    return [{"variant": name, "metric": metrics.get(name, {}).get("metric"),
             "value": metrics.get(name, {}).get("value"), "standard_error": metrics.get(name, {}).get("standard_error"),
             "bytes": bytes_of.get(name), "median_ms": arms.get(name, {}).get("median_ms")} for name in names]
