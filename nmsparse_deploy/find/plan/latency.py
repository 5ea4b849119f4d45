"""The time that the pattern saves on each fusion group, measured or from the roofline, and on the
whole model.

Compilers merge a fusion group into one GEMM `[K, ΣN]`, so that is the shape which is looked up. A
latency table is a JSON file

    {"gpu": "A100", "rows": [{"k": 4096, "n": 6144, "rows": 2048, "dense_us": 310.0, "sparse_us": 195.0}, ...]}

with `rows` = batch times tokens of the GEMM. Where the merged shape is missing, its members must be
there one by one, and are added up. Everything else in the model is taken to cost its share of the
FLOPs: with the share `f` of the FLOPs in targets that take `t` together the model takes `t / f`,
and saving `s` of it gains `1 / (1 - f s / t)` (Amdahl).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.facts import Json
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.roofline import GPUS, Gpu, gemm_seconds
from nmsparse_deploy.pattern import Pattern
from nmsparse_deploy.system.sparse_cores import ELIGIBLE, shape_verdict

ROWS = 2048
"""Rows of a GEMM (batch times tokens) when neither the user nor the table says otherwise."""


@dataclass(frozen=True)
class Latency:
    """Microseconds of one fusion group, all members together."""

    dense_us: float
    sparse_us: float

    @property
    def saving_us(self) -> float:
        return self.dense_us - self.sparse_us


@dataclass(frozen=True)
class LatencySource:
    """A source of latencies: `status` is `measured` (a table) or `predicted` (the roofline of
    `gpu`)."""

    status: str
    gpu: str
    rows: int
    table: Mapping[tuple[int, int], Latency] | None = None
    roofline: Gpu | None = None

    def group(self, members: Sequence[Target], pattern: Pattern) -> Latency:
        """Return the dense and the sparse latency of a fusion group; no saving where sparse tensor
        cores cannot run it.

        Raises `UsageError` when a measured table has no row for the shape.
        """
        k, n = members[0].k, sum(member.n for member in members)
        latency = (
            self._roofline(k, n)
            if self.table is None
            else _looked_up(self.table, members, self.rows)
        )
        return (
            latency
            if shape_verdict(k, n, pattern) in ELIGIBLE
            else Latency(latency.dense_us, latency.dense_us)
        )

    def _roofline(self, k: int, n: int) -> Latency:
        assert self.roofline is not None
        dense, sparse = (
            1e6 * gemm_seconds(self.roofline, self.rows, k, n, kind) for kind in (False, True)
        )
        return Latency(dense, sparse)

    def to_json(self) -> Json:
        return {"status": self.status, "gpu": self.gpu, "rows": self.rows}


def source(gpu: str, rows: int | None = None, table: Path | None = None) -> LatencySource:
    """Return the measured table when there is one, otherwise the roofline of the GPU whose name
    contains `gpu`."""
    if table is not None:
        return _read(table, rows)
    matching = [known for known in GPUS if gpu.lower() in known.name.lower()]
    if not matching:
        raise UsageError(
            f"There are no figures for the GPU '{gpu}'.",
            f"one of: {', '.join(g.name for g in GPUS)}",
        )
    return LatencySource("predicted", matching[0].name, rows or ROWS, roofline=matching[0])


def _read(path: Path, rows: int | None) -> LatencySource:
    if not path.is_file():
        raise UsageError(f"There is no latency table '{path}'.")
    try:
        data = json.loads(path.read_text())
        lines = [
            (
                int(line["rows"]),
                int(line["k"]),
                int(line["n"]),
                Latency(float(line["dense_us"]), float(line["sparse_us"])),
            )
            for line in data["rows"]
        ]
        gpu = str(data.get("gpu", "unnamed"))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{path}' is not a latency table: {type(error).__name__} {error}.",
            'write {"gpu": NAME, "rows": [{"k", "n", "rows", "dense_us", "sparse_us"}, ...]}',
        ) from error
    if any(
        not 0 < time < float("inf")
        for *_, latency in lines
        for time in (latency.dense_us, latency.sparse_us)
    ):
        raise UsageError(f"'{path}' holds a latency that is not a positive number.")
    held = sorted({line[0] for line in lines})
    if rows is None and len(held) == 1:
        rows = held[0]
    if rows not in held:
        raise UsageError(
            f"'{path}' was measured at {', '.join(map(str, held)) or 'no'} rows.",
            "choose one of them with --rows",
        )
    return LatencySource(
        "measured", gpu, rows, {(k, n): latency for at, k, n, latency in lines if at == rows}
    )


def _looked_up(
    table: Mapping[tuple[int, int], Latency], members: Sequence[Target], rows: int
) -> Latency:
    k, n = members[0].k, sum(member.n for member in members)
    if (k, n) in table:
        return table[k, n]
    missing = next((member for member in members if (member.k, member.n) not in table), None)
    if missing is not None:
        shapes = f"k={k}, n={n}" + (
            f" nor for its member k={missing.k}, n={missing.n}" if len(members) > 1 else ""
        )
        raise UsageError(
            f"The latency table has no row for {shapes} at {rows} rows.", "measure it and add it"
        )
    latencies = [table[member.k, member.n] for member in members]
    return Latency(
        sum(latency.dense_us for latency in latencies),
        sum(latency.sparse_us for latency in latencies),
    )


def speedup(share: float, dense_us: float, saving_us: float) -> float:
    """Return the speed-up of the model when `saving_us` of the targets' `dense_us` go; `share` of
    its FLOPs is theirs (`f`)."""
    return 1 / (1 - share * saving_us / dense_us) if dense_us else 1.0


def saving_for(share: float, dense_us: float, wanted: float) -> float:
    """Return the saving that a speed-up of the model takes: the inverse of `speedup`."""
    return (1 - 1 / wanted) * dense_us / share if share else float("inf")
