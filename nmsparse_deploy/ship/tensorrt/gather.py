"""The evidence for an engine: everything that lies beside it, held against the graph that it was
built from."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.prove import VerifyReport, verify_onnx
from nmsparse_deploy.ship.evidence import EngineEvidence
from nmsparse_deploy.ship.ladder import Counters, Kernels, Sources, climb
from nmsparse_deploy.ship.onnx.gemms import gemms
from nmsparse_deploy.ship.onnx.link import LinkMap, verify_linked
from nmsparse_deploy.ship.tensorrt.log import parse_inspector, parse_log
from nmsparse_deploy.ship.tensorrt.sidecar import KERNELS, LAYERS, LOG, Sidecar
from nmsparse_deploy.system.progress import Progress, silent


def verify_engine(
    engine: Path, counters: Path | None = None, progress: Progress = silent
) -> EngineEvidence:
    """Read the evidence for an engine file again from what the build left beside it; nothing is
    loaded or run.

    The graph must be, byte for byte, what the engine was built from, and is verified again: against
    the masks of its run where it lies in one, else by its values. `counters` is the CSV output of
    Nsight Compute. Raises `UsageError` for a file without a sidecar, `CheckFailed` for one that is
    not what its sidecar says.
    """
    if not engine.is_file():
        raise UsageError(f"There is no engine '{engine}'.")
    sidecar = Sidecar.load(engine)
    sidecar.check(engine)
    onnx = sidecar.onnx_path(engine)
    beside = onnx.with_suffix(".link.json")
    link = LinkMap.load(beside) if beside.is_file() else None
    masks = onnx.parents[2] / "masks.safetensors" if len(onnx.parents) > 2 else None
    if link is not None and masks is not None and masks.is_file():
        report = verify_linked(onnx, MaskSet.load(masks), link, progress)
    else:
        report = verify_onnx(onnx, progress=progress)
    return gather(engine, sidecar, report, link, read_counters(counters) if counters else None)


def gather(
    engine: Path,
    sidecar: Sidecar,
    report: VerifyReport,
    link: LinkMap | None,
    counters: Counters | None = None,
) -> EngineEvidence:
    """Climb the ladder with everything that lies beside the engine."""
    onnx = sidecar.onnx_path(engine)
    texts = {
        suffix: engine.with_suffix(suffix).read_text(encoding="utf-8", errors="replace")
        for suffix in (LOG, LAYERS, KERNELS)
        if engine.with_suffix(suffix).is_file()
    }
    log = parse_log(texts[LOG]) if LOG in texts else None
    if log is not None and log.memory:
        raise CheckFailed(
            f"The log of '{engine}' says that tactics were left out for lack of memory, so its choice "
            f"means nothing: {log.memory[0]}"
        )
    sources = Sources(
        {check.node: check for check in report.checks if check.node},
        sidecar.settings.sparse,
        log,
        parse_inspector(texts[LAYERS], f"'{engine.with_suffix(LAYERS)}'")
        if LAYERS in texts
        else None,
        _kernels(engine, texts[KERNELS]) if KERNELS in texts else None,
        counters,
    )
    return climb(engine.name, str(onnx), gemms(onnx, link, sidecar.settings.shapes), sources)


def _kernels(engine: Path, text: str) -> Kernels:
    try:
        return {str(name): int(count) for name, count in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"'{engine.with_suffix(KERNELS)}' is damaged: {error}.") from error


def read_counters(path: Path) -> Counters:
    """Read the table of metrics of `ncu --csv`: by kernel and counter the value, added up over
    launches."""
    try:
        lines = [
            line
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line[:1] == '"'
        ]
        counters: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in csv.DictReader(lines):
            metric = row["Metric Name"].partition(".")[0]
            if metric.endswith(("sparsity_on", "sparsity_off")):
                counters[row["Kernel Name"]][metric] += float(row["Metric Value"].replace(",", ""))
    except (OSError, KeyError, ValueError, AttributeError, csv.Error) as error:
        raise UsageError(f"'{path}' is not the CSV output of Nsight Compute: {error}.") from error
    if not counters:
        raise UsageError(
            f"'{path}' holds no counter that ends in sparsity_on or sparsity_off.",
            "see docs/tensorrt.md for the command",
        )
    return counters
