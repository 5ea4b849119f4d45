"""What pruning cost a text encoder: rank correlation with human similarity ratings, and agreement
of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn.functional import cosine_similarity

from nmsparse_deploy.data.sentence_pairs import Pairs, load_pairs
from nmsparse_deploy.data.sequences import check_sentences_disjoint, max_tokens
from nmsparse_deploy.measure.evaluate.agree import feature_agreement
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED, Arm
from nmsparse_deploy.measure.evaluate.result import (
    EvalResult,
    Evaluation,
    Results,
    bootstrap_error,
    bootstrap_pairs,
)
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import Features
from nmsparse_deploy.system.progress import Progress, silent

BATCH = 32
MAX_TOKENS = 128
"""Tokens of a sentence that are read; sentences are shorter."""


def evaluate_encoder(
    arms: Sequence[Arm],
    model: LoadedModel,
    data: str,
    calibration: torch.Tensor | None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure rank correlation of cosine similarities with ratings, and agreement with the dense
    model on them.

    `calibration` are the token ids of the run's calibration windows. Raises `NmsparseError` when an
    evaluated sentence lies in them.
    """
    results: Results = {arm.label: [] for arm in arms}
    difference = None
    compared = None if calibration is None else 0
    samples = {}
    for pairs in load_pairs(data):
        texts = sorted({text for first, second, _ in pairs.rated for text in (first, second)})
        if calibration is not None and compared is not None:
            ids = model.processor(texts, add_special_tokens=False)["input_ids"]
            compared += check_sentences_disjoint(calibration, ids)
        samples[pairs.name] = {
            "pairs": len(pairs.rated),
            "texts": len(texts),
            "fingerprint": pairs.fingerprint,
        }
        similar, features = {}, {}
        for arm in arms:
            features[arm.label] = _encode(arm, model, texts, f"reading {pairs.name}", progress)
            similar[arm.label] = _similarities(features[arm.label], pairs, texts)
        rated = torch.tensor([rating for _, _, rating in pairs.rated], dtype=torch.float64)
        for arm in arms:
            protocol = {
                "data": pairs.name,
                "data_fingerprint": pairs.fingerprint,
                "pairs": len(pairs.rated),
                "pooling": "mean of the sequence's tokens",
                "similarity": "cosine",
                "longest": MAX_TOKENS,
                "dtype": arm.dtype,
            }
            similarities = similar[arm.label]
            if similarities is not None:
                error = bootstrap_error(_correlation(similarities, rated), len(rated))
                results[arm.label].append(
                    EvalResult(
                        f"sts_spearman@{pairs.name}",
                        spearman(similarities, rated),
                        error,
                        len(rated),
                        arm.where,
                        protocol,
                    )
                )
            if arm.label != DENSE:
                results[arm.label] += feature_agreement(
                    features[DENSE],
                    features[arm.label],
                    arm.where,
                    pairs.name,
                    {**protocol, "against": DENSE},
                )
        dense, pruned = similar.get(DENSE), similar.get(PRUNED)
        if difference is None and dense is not None and pruned is not None:
            difference = bootstrap_pairs(
                _correlation(dense, rated),
                _correlation(pruned, rated),
                len(rated),
                f"sts_spearman@{pairs.name}",
            )
    return Evaluation(
        {**results},
        {"sentences_compared": compared, "overlaps": 0},
        difference=difference,
        samples=samples,
    )


def _encode(
    arm: Arm, model: LoadedModel, texts: Sequence[str], what: str, progress: Progress
) -> Features:
    """Return pooled features of every text, in the order given; token features are averaged away
    here."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    by_length = arm.features(
        _batches(model, [texts[index] for index in order]), len(texts), what, progress
    )
    back = torch.tensor(order).argsort()
    return Features(
        None if by_length.pooled is None else by_length.pooled[back],
        None,
        None if by_length.logits is None else by_length.logits[back],
    )


def _batches(model: LoadedModel, texts: Sequence[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    tokenizer = model.processor
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=min(MAX_TOKENS, max_tokens(tokenizer)),
        )
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def _similarities(features: Features, pairs: Pairs, texts: Sequence[str]) -> torch.Tensor | None:
    if features.pooled is None:
        return None
    place = {text: number for number, text in enumerate(texts)}
    first = features.pooled[[place[text] for text, _, _ in pairs.rated]].double()
    second = features.pooled[[place[text] for _, text, _ in pairs.rated]].double()
    return cosine_similarity(first, second, dim=1)


def _correlation(similar: torch.Tensor, rated: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Return the rank correlation as a function of the pairs that are looked at."""
    return lambda index: spearman(similar[index], rated[index])


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the correlation of the ranks; ties share the mean of their ranks."""
    x, y = (ranks(values) - (len(values) - 1) / 2 for values in (a, b))
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Return ranks from 0, ties averaged."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[place]
