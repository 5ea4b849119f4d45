"""`nmsparse-deploy bench`."""

from collections.abc import Mapping

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb
from nmsparse_deploy.cli.options import Asked, Fields
from nmsparse_deploy.errors import UsageError


@verb(
    Fields("Bench", "batch length rounds engine"),
    device="cpu, cuda, or auto: cuda where there is one",
    precision="on a GPU: fp16, bf16, int8 or fp8",
)
def bench(asked: Asked, run: Run = None, *, device: str = "auto", precision: str = "fp16") -> None:
    """Time the dense and the pruned model side by side on this machine; on a GPU in all arms, with
    kernel names."""
    import torch

    from nmsparse_deploy.measure.bench.model_arms import Job
    from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES

    for what, value, choices in (
        ("device", device, ("auto", "cpu", "cuda")),
        ("precision", precision, DTYPES),
    ):
        if value not in choices:
            raise UsageError(f"There is no {what} '{value}'.", f"one of: {', '.join(choices)}")
    spec, opened = asked.read(nms.Bench), nms.RunDir.open(run)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        job = Job(spec.batch, spec.length, precision, max(spec.rounds, 5), spec.engine)
        measured = nms.bench_run(opened, job, progress=output.progress)
        rows = [
            (
                f"{phase.name}, {phase.how}",
                arm.name,
                f"{arm.median_ms:.3f}",
                f"{arm.p99_ms:.3f}",
                _speed_up(arm.name, phase.over_dense),
            )
            for phase in measured.phases
            for arm in phase.arms
        ]
        output.table(
            measured.to_json(),
            ("work", "arm", "median ms", "p99 ms", "speed-up over dense"),
            rows,
            [measured.verdict],
        )
        return
    result = nms.bench(opened, spec, output.progress)
    rows = [
        (
            arm.name,
            arm.kernel,
            f"{arm.median_ms:.1f}",
            f"{arm.p10_ms:.1f} to {arm.p90_ms:.1f}",
            _speed_up(arm.name, result.ratios),
        )
        for arm in result.arms
    ]
    bounds = [
        f"predicted upper bound, {p.gpu}, {p.rows} rows: GEMMs {p.gemm_speedup:.2f}x, model "
        f"{p.model_speedup:.2f}x ({p.flop_share:.0%} of FLOPs in pruned GEMMs)"
        for p in result.predicted
    ]
    output.table(
        result.to_json(),
        ("arm", "kernels", "median ms", "p10 to p90", "speed-up over dense"),
        rows,
        [result.verdict, *bounds],
    )


def _speed_up(arm: str, ratios: Mapping[str, object]) -> str:
    return str(ratios.get(arm, "1" if arm == "dense" else "no dense twin on these kernels"))
