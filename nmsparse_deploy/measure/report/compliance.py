"""Does every tensor hold, in every place that was checked; and what nobody checked here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from nmsparse_deploy.measure.report.stages import Stages

COLUMNS = ("tensor", "dtype", "shape", "pattern", "axis", "groups", "bad", "first_bad", "negative_zeros", "nonfinite",
           "mask_mismatch", "shape_verdict", "problems", "ok")
SUMS = ("groups", "bad", "negative_zeros", "nonfinite")


def compliance(stages: Stages) -> dict[str, Any] | None:
    """Places with their counts and tensors; None when nothing was verified."""
    if stages.verify is None:
        return None
    with stages.of("verify.json"):
        places = [_place(stages.path, report) for report in stages.verify["reports"]]
    return {"checked": sum(place["checked"] for place in places), "failed": sum(place["failed"] for place in places),
            "problems": sum(len(place["problems"]) for place in places),
            "ok": bool(places) and all(place["ok"] for place in places), "places": places}


def _place(run: Path, report: dict[str, Any]) -> dict[str, Any]:
    claims = sorted((check for check in report["checks"] if check["skipped"] is None), key=lambda check: check["ok"])
    compared = [check["mask_mismatch"] for check in claims if check["mask_mismatch"] is not None]
    artefact = inside(run, report["artefact"])
    return {"place": _title(report["place"], artefact), "artefact": artefact, "ok": report["ok"],
            "checked": report["checked"], "failed": report["failed"], "skipped": report["skipped"],
            **{key: sum(check[key] for check in claims) for key in SUMS},
            "mask_mismatch": sum(compared) if compared else None,
            "zero_share": report.get("zero_share"),
            "shape_verdicts": dict(Counter(check["shape_verdict"] or "no 2:4 kernel for this pattern"
                                           for check in claims)),
            "skipped_because": dict(Counter(check["skipped"] for check in report["checks"] if check["skipped"])),
            "problems": report["problems"], "bytes_read": report["bytes_read"], "seconds": report["seconds"],
            "tensors": [{key: check[key] for key in COLUMNS} for check in claims]}


def _title(place: str, artefact: str) -> str:
    parts = Path(artefact).parts
    if place == "onnx":
        which = "" if Path(artefact).stem == "model" else f" {Path(artefact).stem}"
        return f"ONNX {parts[-2]}{which}" if len(parts) > 1 else "ONNX"
    return {"file": "saved model", "torch": "model in memory"}.get(place, place)


def inside(run: Path, text: str) -> str:
    """An artefact's path within its run, also after the run was moved; else the text as it is."""
    parts = Path(text).parts
    for start in range(len(parts)):
        tail = Path(*parts[start:])
        if not tail.is_absolute() and (run / tail).exists():
            return tail.as_posix()
    return text


def not_checked(stages: Stages) -> list[dict[str, str]]:
    """Steps that this run could not take or has not taken, each with its reason."""
    rows: list[dict[str, str]] = []
    with stages.of("verify.json"):
        recorded = stages.verify or {}
        rows += [{"place": row["place"], "why": row["why"]} for row in recorded.get("not_checked", [])]
        places = {report["place"] for report in recorded.get("reports", [])}
    if stages.engines is not None:
        rows = [row for row in rows if row["place"] != "engine"]  # it was built after that verification
    named = {row["place"] for row in rows}
    if stages.verify is None:
        rows.append({"place": "pattern", "why": "the run has no verification, see nmsparse-deploy verify"})
    if "onnx" not in places | named:
        rows.append({"place": "onnx", "why": "no ONNX file was exported, see nmsparse-deploy export"})
    if stages.engines is None and "engine" not in places | named:
        rows.append({"place": "engine", "why": "no inference engine was built"})
    if stages.evaluate is None:
        rows.append({"place": "accuracy", "why": "not evaluated, see nmsparse-deploy evaluate"})
    return rows + _agreement(stages) + _speed(stages)


def _agreement(stages: Stages) -> list[dict[str, str]]:
    with stages.of("export.json"):
        files = (stages.export or {}).get("files", [])
        rows = [{"place": f"output of ONNX {row['precision']}", "why": row["agreement"]["not_checked"]}
                for row in files if "not_checked" in (row.get("agreement") or {})]
        absent = [found for row in files for found in (row.get("tensorrt_rtx") or {}).values()
                  if "not_checked" in found]
        return rows + ([{"place": "TensorRT-RTX compile", "why": absent[0]["not_checked"]}] if absent else [])


def _speed(stages: Stages) -> list[dict[str, str]]:
    if stages.bench is None:
        return [{"place": "latency", "why": "not measured, see nmsparse-deploy bench"}]
    with stages.of("bench.json"):
        if stages.bench["where"] != "cpu":
            return []
    return [{"place": "sparse kernels", "why": "the arms were timed on a CPU, which has none"}]
