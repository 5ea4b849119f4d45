"""How far a pruned model's outputs moved from the dense one's, on the same samples; no labels
needed."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, kl_div

from nmsparse_deploy.measure.evaluate.result import EvalResult, Protocol, mean_result
from nmsparse_deploy.models.outputs import Features


def feature_agreement(
    dense: Features,
    other: Features,
    where: str,
    suffix: str,
    protocol: Protocol,
    mask: torch.Tensor | None = None,
) -> list[EvalResult]:
    """Measure the cosine per token and of the pooled vector; of classifiers KL(dense || other) in
    nats and same top1.

    One value a sample. `mask` [samples, tokens] says which tokens count.
    """
    measures: dict[str, torch.Tensor] = {}
    if dense.pooled is not None and other.pooled is not None:
        measures["pooled_cosine"] = cosine_similarity(
            dense.pooled.double(), other.pooled.double(), dim=-1
        )
    if dense.tokens is not None and other.tokens is not None:
        cosine = cosine_similarity(dense.tokens.double(), other.tokens.double(), dim=-1)
        weight = torch.ones_like(cosine) if mask is None else mask.double()
        measures["token_cosine"] = (cosine * weight).sum(1) / weight.sum(1)
    if dense.logits is not None and other.logits is not None:
        a, b = dense.logits.double(), other.logits.double()
        measures["kl"] = kl_div(
            b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        measures["same_top1"] = (a.argmax(-1) == b.argmax(-1)).double()
    return [
        mean_result(f"{name}@{suffix}", values.tolist(), where, protocol)
        for name, values in measures.items()
    ]
