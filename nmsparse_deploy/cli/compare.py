"""`nmsparse-deploy compare`."""

from pathlib import Path

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import DEMO, output, verb
from nmsparse_deploy.cli.options import Asked, Fields


@verb(
    Fields("Evaluate", "data tokens context"),
    model="hub name, folder or .gguf file",
    recipes="recipe files, or METHOD or METHOD+REFINEMENT; the first is the reference",
    out="where the runs go [default: runs/compare]",
)
def compare(
    asked: Asked, recipes: tuple[str, ...], *, model: str = DEMO, out: Path | None = None
) -> None:
    """Prune one model by several recipes and put accuracy beside cost; finished runs are kept."""
    from nmsparse_deploy.comparison import load

    result = nms.compare(
        load(recipes), model, asked.read(nms.Evaluate, continuation=0), out, output.progress
    )
    dense = result.dense
    rows = [("dense", f"{dense.value:.4g} ± {dense.standard_error:.2g}", "", "", "")]
    rows += [
        (
            row.recipe,
            f"{row.value:.4g} ± {row.standard_error:.2g}",
            f"{row.gap_closed:.0%}" if number else "reference",
            f"{row.seconds:.0f} s",
            f"{row.peak_memory_mb:,} MB",
        )
        for number, row in enumerate(result.rows)
    ]
    output.table(
        result.to_json(),
        ("recipe", dense.metric, "gap to dense closed", "prune time", "peak memory"),
        rows,
        [result.page],
    )
