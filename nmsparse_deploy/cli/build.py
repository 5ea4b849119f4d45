"""`nmsparse-deploy build`."""

from typing import Any

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb
from nmsparse_deploy.cli.options import Asked, Fields


@verb(Fields("Build", "precision batch length shapes level timing_iterations route allow_fp32"))
def build(asked: Asked, run: Run = None) -> None:
    """Build TensorRT engines with and without sparse weights, and show which layers got sparse kernels."""
    from nmsparse_deploy.ship.tensorrt.stage import parse_shapes

    spec = asked.read(nms.Build, shapes=parse_shapes(asked.sections["Build"].get("shapes", [])))
    show_engines(nms.build(nms.RunDir.open(run), spec, output.progress), {})


def show_engines(rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    lines = [f"{row['path']}: {row['bytes'] / 1e6:.0f} MB, built in {row['seconds']:.0f} s. "
             f"{row['evidence']['verdict']}" for row in rows]
    output.result({**more, "engines": rows}, lines)
