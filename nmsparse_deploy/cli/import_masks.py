"""`nmsparse-deploy import`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import output, verb


@verb(
    called="import",
    model="the dense model; or a sparse one, if nothing else is given",
    masks="masks for it: .npz (packed bits), .pt, .safetensors, or a folder of them",
    sparse="the same model, pruned elsewhere",
    pattern="keep:group",
    out="run folder [default: runs/MODEL-imported-PATTERN]",
)
def import_masks(
    model: str,
    *,
    masks: Path | None = None,
    sparse: str | None = None,
    pattern: str = "2:4",
    out: Path | None = None,
) -> None:
    """Make a run of masks or of a sparse model that were found elsewhere, and verify it."""
    done = nms.import_result(model, masks, sparse, pattern, out, output.progress)
    output.result(done.to_json(), [done.summary(), f"next: nmsparse-deploy export {done.run.path}"])
