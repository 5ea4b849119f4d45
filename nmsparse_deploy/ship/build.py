"""The stage that builds engines of a run, in whichever runtime the recipe names."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.recipe import Build
from nmsparse_deploy.registry import ENGINES
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.engine import RECORD, BuiltEngine, Engine, built_engines
from nmsparse_deploy.system.environment import environment
from nmsparse_deploy.system.progress import Progress, silent


def build(run: RunDir, spec: Build = Build(), progress: Progress = silent) -> Sequence[BuiltEngine]:
    """Build the engines of `spec` from what the run holds; they join `engines.json` with what is
    known of each.

    Raises `UsageError` when there is nothing to build from, `CheckFailed` when that does not hold
    the masks, `NmsparseError` when the runtime or its device is not here; what was exported stays.
    """
    start = time.perf_counter()
    engine: type[Engine] = ENGINES.load(spec.engine)
    with run.lock():
        rows = engine.deploy(run, spec, progress)
        made = {row.key for row in rows}
        others = [row for row in built_engines(run) if row.key not in made]
        run.write_json(
            RECORD, {"engines": [row.to_json() for row in (*others, *rows)], **environment()}
        )
        run.finish("build", time.perf_counter() - start, spec=spec.model_dump(mode="json"))
    return rows


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE`. Raises `UsageError` for anything else."""
    options = {}
    for text in texts:
        name, _, options[name] = text.partition("=")
        if not name or not options[name]:
            raise UsageError(f"'{text}' is no option.", "write it as --option threads=4")
    return options
