"""What pruning cost: every metric that `evaluate.json` holds, whatever its name, with its protocol."""

from __future__ import annotations

import base64
from typing import Any

from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.runs.wording import counted

FIRST = ("dense", "pruned")
PNG = b"\x89PNG\r\n\x1a\n"


def quality(stages: Stages) -> dict[str, Any] | None:
    """Rows per label, the paired comparison, and the protocol; None when nothing was evaluated."""
    data = stages.evaluate
    if data is None:
        return None
    with stages.of("evaluate.json"):
        labels = sorted(data["results"], key=lambda label: (FIRST.index(label) if label in FIRST else 9, label))
        rows = [_row(label, result) for label in labels for result in _several(data["results"][label])]
        return {"rows": rows, "comparison": _comparison(data, rows), "protocols": _protocols(rows),
                "held_out": data.get("held_out"), "environment": _environment(data)}


def _several(results: Any) -> list[dict[str, Any]]:
    return results if isinstance(results, list) else [results]


def _row(label: str, result: dict[str, Any]) -> dict[str, Any]:
    samples = result.get("samples")
    error = result.get("standard_error") if samples != 1 else None  # one sample has no spread
    return {"label": label, "metric": str(result["metric"]), "value": result["value"], "standard_error": error,
            "samples": samples, "where": result.get("where"), "protocol": dict(result.get("protocol") or {})}


def _comparison(data: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The paired ratio or difference, as the evaluation computed it; no interval where there was one sample."""
    for kind in ("ratio", "difference"):
        found = data.get(kind)
        if found:
            single = any(row["samples"] == 1 for row in rows)
            low, high = (None, None) if single else (found.get("low"), found.get("high"))
            return {"kind": kind, "value": found[kind], "low": low, "high": high}
    return None


def _protocols(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The distinct protocols, each with the labels that it holds for."""
    found: list[dict[str, Any]] = []
    for row in rows:
        facts = {"metric": row["metric"], "samples": row["samples"], **counted(row["protocol"])}
        same = next((entry for entry in found if entry["facts"] == facts), None)
        if same:
            same["labels"].append(row["label"])
        else:
            found.append({"labels": [row["label"]], "facts": facts})
    return found


def _environment(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("versions", "hardware") if key in data}


def continuations(stages: Stages) -> dict[str, Any] | None:
    """Prompts with the text of every label side by side; None when none were written."""
    data = stages.evaluate
    if data is None or not data.get("continuations"):
        return None
    with stages.of("evaluate.json"):
        texts = data["continuations"]
        labels = sorted(texts, key=lambda label: (FIRST.index(label) if label in FIRST else 9, label))
        prompts = list(dict.fromkeys(row["prompt"] for label in labels for row in texts[label]))
        found = {(label, row["prompt"]): row["text"] for label in labels for row in texts[label]}
        rows = [{"prompt": prompt, "texts": {label: found.get((label, prompt)) for label in labels}}
                for prompt in prompts]
    return {"labels": labels, "rows": rows}


def images(stages: Stages) -> list[dict[str, str]]:
    """Pictures that the evaluation drew, each a title and a PNG in base64; checked, because a page will embed them."""
    data = stages.evaluate
    if data is None or not data.get("images"):
        return []
    with stages.of("evaluate.json"):
        rows = [{"title": str(row["title"]), "png_base64": str(row["png_base64"])} for row in data["images"]]
        for row in rows:
            if not base64.b64decode(row["png_base64"], validate=True).startswith(PNG):
                raise ValueError(f"the picture '{row['title']}' is not a PNG")
    return rows
