"""The comparison of an artefact's outputs with the model's."""

import math

import pytest
import torch

from nmsparse_deploy.errors import CheckFailed, UsageError
from nmsparse_deploy.prove.agreement import agreement


def test_agreement_of_equal_outputs_is_perfect():
    x = torch.randn(2, 3, 10)
    same = agreement(x, x.numpy())
    assert (same.positions, same.max_abs, same.relative, same.argmax_share, same.mean_kl) == (
        6,
        0,
        0,
        1,
        0,
    )
    assert agreement(x, x, "features").cosine == pytest.approx(1)


def test_agreement_measures_the_divergence_in_nats():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    found = agreement(p.log(), q.log())
    assert found.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert agreement(torch.eye(300), torch.eye(300).roll(1, 0)).argmax_share == 0


def test_agreement_counts_only_what_the_mask_says():
    a, b = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    b[1, 1] = 7
    mask = torch.tensor([[1, 1], [1, 0]])
    assert agreement(a, b, mask=mask).max_abs == 0
    assert agreement(a, b, mask=mask).positions == 3


def test_agreement_refuses_what_cannot_be_compared():
    with pytest.raises(CheckFailed, match="2 of 4 values of the output are not finite"):
        agreement(torch.zeros(1, 4), torch.tensor([[0.0, math.inf, math.nan, 1.0]]))
    with pytest.raises(UsageError, match="shape"):
        agreement(torch.zeros(1, 4), torch.zeros(1, 5))
