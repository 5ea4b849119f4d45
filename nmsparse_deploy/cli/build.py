"""`nmsparse-deploy build`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb
from nmsparse_deploy.cli.options import Asked, Fields

if TYPE_CHECKING:
    from nmsparse_deploy.ship.engine import BuiltEngine


@verb(
    Fields(
        "Build",
        "engine precision batch length shapes level timing_iterations route allow_fp32 options",
    )
)
def build(asked: Asked, run: Run = None) -> None:
    """Build engines of a run; in TensorRT with and without sparse weights, showing which layers got
    sparse kernels."""
    from nmsparse_deploy.ship.build import parse_options
    from nmsparse_deploy.ship.tensorrt.stage import parse_shapes

    typed = asked.sections["Build"]
    spec = asked.read(
        nms.Build,
        shapes=parse_shapes(typed.get("shapes", [])),
        options=parse_options(typed.get("options", [])),
    )
    show_engines(nms.build(nms.RunDir.open(run), spec, output.progress), {})


def show_engines(rows: "Sequence[BuiltEngine]", more: dict[str, Any]) -> None:
    output.result({**more, "engines": [row.to_json() for row in rows]}, [row.line for row in rows])
