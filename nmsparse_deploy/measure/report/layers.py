"""Layer by layer: the output error of every pruned matrix, and what the masks look like."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import numpy as np

from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.measure.report.stages import Stages
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.runs.run_dir import RunDir

CORNER = 64
KEYS = ("name", "block", "pattern", "shape", "axis", "relative_error", "seconds")


def layers(stages: Stages) -> dict[str, Any]:
    """Rows of `layers.json` and, where the method measured them, relative errors by layer kind and block."""
    with stages.of("plan.json"):
        plan = {row["name"]: row for row in (stages.plan or {}).get("rows", [])}
    with stages.of("layers.json"):
        rows = [{**{key: row[key] for key in KEYS},
                 "kind": _kind(row["name"], plan.get(row["name"], {}))} for row in stages.layers]
        return {"rows": rows, "series": _series(rows)}


def _kind(name: str, planned: dict[str, Any]) -> str:
    """Last path component of the parameter's module."""
    return str(planned.get("module") or name.rpartition(".")[0] or name).rpartition(".")[2]


def _series(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Kind -> [[block, error], ...]; several layers of one kind in a block (experts) give their median."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if isinstance(row["relative_error"], int | float):
            found[row["kind"]][row["block"]].append(float(row["relative_error"]))
    return {kind: [[block, statistics.median(errors)] for block, errors in sorted(blocks.items())]
            for kind, blocks in found.items()}


def masks(run: RunDir) -> dict[str, Any] | None:
    """A corner of one mask, and how often every position of a group is kept over all N:M masks; None without masks."""
    if not (run / "masks.safetensors").is_file():
        return None
    found = MaskSet.load(run / "masks.safetensors").masks
    if not found:
        return None
    name, first = next(iter(found.items()))
    kept: dict[str, np.ndarray] = {}
    groups: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for mask in found.values():
        if not isinstance(mask.pattern, NMPattern):
            continue
        rows = _rows(mask).reshape(-1, mask.pattern.group)
        key = str(mask.pattern)
        kept[key] = kept.get(key, 0) + rows.sum(0, dtype=np.int64)
        groups[key] += len(rows)
        count[key] += 1
    positions = [{"pattern": key, "density": _density(found, key), "masks": count[key], "groups": groups[key],
                  "kept": (kept[key] / groups[key]).tolist()} for key in sorted(kept)]
    corner = _rows(first)[:CORNER, :CORNER]
    return {"tensor": name, "pattern": str(first.pattern), "axis": first.axis, "group": first.pattern.alignment,
            "corner": ["".join("1" if value else "0" for value in row) for row in corner], "positions": positions}


def _rows(mask: Mask) -> np.ndarray:
    """The mask with its group axis last, as rows."""
    bits = np.moveaxis(mask.unpack().numpy(), mask.axis, -1)
    return bits.reshape(-1, bits.shape[-1])


def _density(found: dict[str, Mask], key: str) -> float:
    return next(mask.pattern.density for mask in found.values() if str(mask.pattern) == key)
