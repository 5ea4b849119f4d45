"""What pruning cost a model of any other kind: how far its outputs moved on inputs that are
prepared for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nmsparse_deploy.data.tensor_inputs import check_inputs_disjoint, prepared
from nmsparse_deploy.measure.evaluate.agree import feature_agreement
from nmsparse_deploy.measure.evaluate.arms import BATCH, DENSE, Arm
from nmsparse_deploy.measure.evaluate.result import Evaluation, Results
from nmsparse_deploy.system.progress import Progress, silent


def evaluate_prepared(
    arms: Sequence[Arm], data: str, calibration: torch.Tensor | None, progress: Progress = silent
) -> Evaluation:
    """Measure the agreement of every arm with the dense model on the samples of a file.

    `calibration` are the content hashes of the run's calibration samples. Raises `NmsparseError`
    when an evaluated sample is among them.
    """
    sample = prepared(data)
    compared = None if calibration is None else check_inputs_disjoint(calibration, sample)
    answers = {
        arm.label: arm.features(
            sample.batches(BATCH), len(sample), f"reading {sample.source}", progress, True
        )
        for arm in arms
    }
    results: Results = {}
    for arm in arms:
        protocol = {
            "data": sample.source,
            "data_fingerprint": sample.fingerprint,
            "samples": len(sample),
            "dtype": arm.dtype,
            "against": DENSE,
        }
        results[arm.label] = (
            []
            if arm.label == DENSE
            else feature_agreement(
                answers[DENSE], answers[arm.label], arm.where, sample.source, protocol
            )
        )
    return Evaluation(
        {**results},
        {"samples_compared": compared, "overlaps": 0},
        samples={"prepared": sample.to_json()},
    )
