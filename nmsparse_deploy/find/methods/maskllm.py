"""MaskLLM: learn which weights of every group stay by back-propagation through a distribution over
masks.

Every group holds a categorical distribution over its candidate masks `S_i`. A step samples a
relaxed mask by Gumbel softmax, multiplies the frozen weights with it, and moves the logits by the
gradient of the loss; the scale `kappa` of the logits rises and the temperature `tau` falls until
samples are masks. A term `-lambda*sum ||W*m~||^2` rewards large kept weights, which keep the
gradient alive. Learning starts at a one-shot prior `m0`:

    pi_i = sigma*alpha*(<m0, S_i> - N^2/M)
    e^(kappa*sigma*alpha*N) / sum_i e^(kappa*sigma*alpha*<m0, S_i>) = confidence

Only `kappa*sigma` and `kappa*rate` matter, so `confidence` and `step_size = kappa_end*rate` are
what is set. The paper adds the prior to Gaussian noise of its own size, which loses the prior in
one group of eighteen; here it stands alone. The masks themselves are in
`learn/mask_relaxations.py`: six-way for 2:4 as published, compact and straight-through.

Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, NeurIPS 2024,
arXiv:2409.17481. Written from the paper's formulas; the published code was not used.
"""

from __future__ import annotations

import math

import torch

from nmsparse_deploy.find.learn.adam8 import STATE_BYTES
from nmsparse_deploy.find.learn.learner import ADAM_BYTES, MASK_BYTES, LearnedMethod, MaskLearner
from nmsparse_deploy.find.learn.mask_parametrization import MaskParametrization, MaskSite
from nmsparse_deploy.find.learn.mask_relaxations import (
    Annealing,
    CandidateDistribution,
    StraightThroughScores,
    form_for,
)
from nmsparse_deploy.find.learn.step_context import LinearSchedule
from nmsparse_deploy.pattern import NMPattern
from nmsparse_deploy.recipe import MaskLLM


def make(spec: MaskLLM) -> MaskLearner:
    """Make the learner for a recipe's settings."""
    annealing = Annealing(
        LinearSchedule(*spec.kappa),
        LinearSchedule(*spec.tau),
        spec.confidence,
        spec.noise,
        spec.regulariser,
    )

    def parametrize(site: MaskSite) -> MaskParametrization:
        form = form_for(site.pattern) if spec.form == "auto" else spec.form
        if form == "scores":
            return StraightThroughScores(site.pattern, annealing)
        return CandidateDistribution(site.pattern, annealing, compact=form == "compact")

    learner = MaskLearner(
        parametrize, spec.step_size / spec.kappa[1], decay=spec.decay, moments=spec.moments
    )
    learner.shards = spec.moments == 32  # codes of blocks have no rows to split
    return learner


def bytes_per_weight(spec: MaskLLM, pattern: NMPattern) -> float:
    """Return 24 bytes for the six logits of a 2:4 group, 16 for the other forms; with moments of a
    byte 15 and 10; and the best mask."""
    candidates = spec.form == "candidates" or (
        spec.form == "auto" and form_for(pattern) == "candidates"
    )
    values = math.comb(pattern.group, pattern.keep) / pattern.group if candidates else 1
    number = ADAM_BYTES if spec.moments == 32 else 2 * torch.float32.itemsize + STATE_BYTES
    return number * values + MASK_BYTES


LEARNED = LearnedMethod(
    make, bytes_per_weight, lighter=({"form": "compact"}, {"form": "compact", "moments": 8})
)
