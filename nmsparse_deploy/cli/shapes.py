"""What `prune`, `export` and `verify` say of weights whose shape no sparse tensor core takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmsparse_deploy.system.sparse_cores import INELIGIBLE, POSSIBLE_K, POSSIBLE_N

if TYPE_CHECKING:
    from nmsparse_deploy.runs.run_dir import RunDir


def planned(run: RunDir) -> list[str]:
    """Return the pruned matrices of a run that are ineligible by their shape."""
    from nmsparse_deploy.measure.report.stages import PlanStage
    from nmsparse_deploy.runs.stage_file import read_stage

    plan = read_stage(run, "plan.json", PlanStage)
    rows = plan.rows if plan is not None else ()
    return [row.name for row in rows if row.pattern and row.shape_verdict == INELIGIBLE]


def shape_lines(names: Sequence[str]) -> list[str]:
    """Say how many there are, why, and which; nothing when there is none."""
    from nmsparse_deploy.runs.wording import first_names

    if not names:
        return []
    which = "1 of these weights" if len(names) == 1 else f"{len(names)} of these weights"
    return [
        f"sparse tensor cores cannot run {which} by shape (K has to be a multiple of {POSSIBLE_K}, "
        f"N of {POSSIBLE_N}): {first_names(names)}"
    ]
