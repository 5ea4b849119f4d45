"""A runtime beside PyTorch on a GPU: what it can run of a run, in the arms that it compares."""

from __future__ import annotations

from collections.abc import Mapping

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.measure.bench.result import Phase
from nmsparse_deploy.ship.engine import Case, Engine, Tensor
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.timing import Call, interleave, ratio, summarise


def engine_phases(
    engine: type[Engine],
    works: Mapping[str, Mapping[str, Case]],
    inputs: Mapping[str, Tensor],
    shape: dict[str, int],
    rounds: int,
    progress: Progress = silent,
) -> tuple[list[Phase], dict[str, str]]:
    """Time every workload in the arms that run here; returns its phases, and by workload and arm
    why others do not run.

    Arms are compared only with a twin that differs in sparse weights alone.
    """
    phases, failed = [], {}
    for name, arms in works.items():
        calls: dict[str, Call] = {}
        for arm, case in arms.items():
            progress(f"opening {name} with {arm}", 0, 0)
            try:
                calls[arm] = engine.build(*case).bound(inputs)
            except NmsparseError as error:
                failed[f"{name}, {arm}"] = error.message
        if not calls:
            continue
        times = interleave(calls, rounds)
        pairs = {arm: twin for arm, twin in engine.twins.items() if {arm, twin} <= calls.keys()}
        phases.append(
            Phase(
                name,
                False,
                shape,
                tuple(summarise(arm, engine.title, times[arm]) for arm in calls),
                {},
                {arm: ratio(times[twin], times[arm]) for arm, twin in pairs.items()},
            )
        )
    return phases, failed
