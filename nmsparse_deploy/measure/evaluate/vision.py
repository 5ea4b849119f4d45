"""What pruning cost a vision model: labelled accuracy, and agreement of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nmsparse_deploy.data.images import ImageSample, check_images_disjoint, evaluation_images
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.measure.evaluate.agree import feature_agreement
from nmsparse_deploy.measure.evaluate.arms import BATCH, DENSE, PRUNED, Arm
from nmsparse_deploy.measure.evaluate.probe import (
    NEIGHBOURS,
    PENALTY,
    Probe,
    fit_probe,
    hits,
    nearest_classes,
)
from nmsparse_deploy.measure.evaluate.result import (
    Difference,
    DrawnImage,
    EvalResult,
    Evaluation,
    NotChecked,
    Protocol,
    Results,
    mean_result,
    paired_difference,
)
from nmsparse_deploy.measure.evaluate.saliency_maps import (
    LABELLED_SIZES,
    map_agreement,
    saliency_head,
    strips,
)
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.outputs import Features
from nmsparse_deploy.recipe import AUTO, Evaluate
from nmsparse_deploy.system.progress import Progress, silent

DATA = "fashion-mnist"
SHOWN = 6
"""Photographs that are drawn."""


def evaluate_vision(
    arms: Sequence[Arm],
    model: LoadedModel,
    typed: str,
    spec: Evaluate,
    calibration: torch.Tensor | None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every metric that the data and the model allow, dense first.

    `typed` is the MODEL of the recipe; `calibration` the content hashes of the run's calibration
    images. Raises `NmsparseError` when an evaluation image was calibrated on.
    """
    results: Results = {arm.label: [] for arm in arms}
    samples: dict[str, object] = {}
    compared = None if calibration is None else 0
    own = spec.data == AUTO
    size = spec.size or (LABELLED_SIZES.get(typed, 0) if own else 0)
    test = _sample(DATA if own else spec.data, "test", model, size, spec.images, progress)
    samples["labelled"] = test.to_json()
    if calibration is not None:
        compared = check_images_disjoint(calibration, test.hashes)
    fit = [arm for arm in arms if not (arm.fixed and test.preprocess.size != model.processor.size)]
    _check_size(fit[0], test)
    labelled = any(test.labels)
    if labelled:
        train = _sample(
            DATA if own else spec.data, "train", model, size, spec.probe + len(test), progress
        )
        train = train.without(test.hashes, spec.probe)
        samples["probe"] = train.to_json()
        _labelled(fit, model, train, test, results, progress)
    else:
        _agreement(fit, test, results, progress)
    images: list[DrawnImage] = []
    if spec.photos:
        photos = _sample(spec.photos, "test", model, 0, spec.images, progress)
        samples["photos"] = photos.to_json()
        if calibration is not None and compared is not None:
            compared += check_images_disjoint(calibration, photos.hashes)
        images = _agreement(arms, photos, results, progress, typed)
    missing = [
        NotChecked(arm.label, "its graph takes another image size than the labelled images have")
        for arm in arms
        if arm not in fit
    ]
    return Evaluation(
        {**results},
        {"images_compared": compared, "overlaps": 0},
        images=images,
        samples=samples,
        difference=_difference(results) if labelled else None,
        not_checked=missing,
    )


def _sample(
    source: str, split: str, model: LoadedModel, size: int, count: int, progress: Progress
) -> ImageSample:
    return evaluation_images(
        source, split, model.processor.at(size), model.input_name, count, progress
    )


def _check_size(arm: Arm, sample: ImageSample) -> None:
    """Raise `UsageError` for a size that the model is not built for; models say so in many ways."""
    try:
        arm.run(next(sample.batches(1)))
    except NmsparseError:
        raise
    except Exception as error:
        raise UsageError(
            f"The model cannot read images of {sample.preprocess.size[0]} x "
            f"{sample.preprocess.size[1]} pixels.",
            "leave the size out to use the model's own",
        ) from error


def _suffix(sample: ImageSample) -> str:
    height, width = sample.preprocess.size
    return f"{sample.title}-{height}px" if height == width else f"{sample.title}-{height}x{width}px"


def _protocol(arm: Arm, sample: ImageSample, split: str) -> Protocol:
    return {
        "data": sample.source,
        "split": split,
        "data_fingerprint": sample.fingerprint,
        "images": len(sample),
        "preprocess": sample.preprocess.to_json(),
        "dtype": arm.dtype,
    }


# --- labels
# -----------------------------------------------------------------------------------------------------------


def _labelled(
    arms: Sequence[Arm],
    model: LoadedModel,
    train: ImageSample,
    test: ImageSample,
    results: Results,
    progress: Progress,
) -> None:
    names = sorted({label for label in train.labels if label is not None})
    if len(names) < 2:
        raise UsageError(
            f"'{train.source}' has {len(names)} labelled class; accuracy needs at least two.",
            "give a folder with one folder per class",
        )
    wanted = _numbers(train.labels, names)
    truth = _numbers(test.labels, names)  # a class that the probe never saw is -1 and never hit
    heads = _head_classes(model, [*names])
    dense_probe: Probe | None = None
    dense: Features | None = None
    for arm in arms:
        known = arm.features(
            train.batches(BATCH), len(train), f"features of {train.title}, training part", progress
        )
        asked = arm.features(
            test.batches(BATCH), len(test), f"features of {test.title}, test part", progress
        )
        suffix, protocol = _suffix(test), _protocol(arm, test, "test")
        if known.pooled is not None and asked.pooled is not None:
            probe = fit_probe(known.pooled, wanted, len(names))
            dense_probe = dense_probe or probe
            facts = {
                **protocol,
                "classes": len(names),
                "probe_images": len(train),
                "probe": f"logistic regression on standardised pooled features, penalty {PENALTY}",
                "probe_fingerprint": train.fingerprint,
            }
            on_dense = {**facts, "probe_trained_on": "dense features"}
            on_own = {**facts, "probe_trained_on": f"{arm.label} features"}
            votes = nearest_classes(known.pooled, wanted, asked.pooled, len(names))
            near = {
                **protocol,
                "classes": len(names),
                "neighbours": NEIGHBOURS,
                "similarity": "cosine",
                "gallery_images": len(train),
            }
            results[arm.label] += [
                *_top("probe", probe.logits(asked.pooled), truth, arm, suffix, on_own),
                *_top(f"knn{NEIGHBOURS}", votes, truth, arm, suffix, near),
                *_top(
                    "dense_probe", dense_probe.logits(asked.pooled), truth, arm, suffix, on_dense
                ),
            ]
        if asked.logits is not None and heads is not None:
            results[arm.label] += _top(
                "head",
                asked.logits[:, heads],
                truth,
                arm,
                suffix,
                {**protocol, "head": "the model's own", "classes": len(names)},
            )
        if dense is None:
            dense = asked
        else:
            results[arm.label] += feature_agreement(
                dense, asked, arm.where, suffix, {**protocol, "against": DENSE}
            )


def _numbers(labels: Sequence[str | None], names: Sequence[str]) -> torch.Tensor:
    table = {name: number for number, name in enumerate(names)}
    return torch.tensor([table.get(label or "", -1) for label in labels])


def _top(
    kind: str, scores: torch.Tensor, truth: torch.Tensor, arm: Arm, suffix: str, protocol: Protocol
) -> list[EvalResult]:
    """Measure top-1, and top-5 where there are more classes than that."""
    return [
        mean_result(f"{kind}_top{k}@{suffix}", hits(scores, truth, k), arm.where, protocol)
        for k in (1, 5)
        if k == 1 or scores.shape[1] > k
    ]


def _head_classes(model: LoadedModel, names: Sequence[str]) -> list[int] | None:
    """Return which outputs of the model's own head are these classes; None unless every name is one
    of its labels."""
    lower = {
        name.lower(): number for name, number in model.adapter.class_labels(model).numbers.items()
    }
    numbers = [lower[name.lower()] for name in names if name.lower() in lower]
    return numbers if len(numbers) == len(names) else None


# --- agreement
# --------------------------------------------------------------------------------------------------------


def _agreement(
    arms: Sequence[Arm], sample: ImageSample, results: Results, progress: Progress, typed: str = ""
) -> list[DrawnImage]:
    """Measure the agreement of every arm with the first, and of its saliency maps where the model
    `typed` has them; returns images of those."""
    features = {
        arm.label: arm.features(
            sample.batches(BATCH), len(sample), f"features of {sample.title}", progress, True
        )
        for arm in arms
    }
    head, maps = saliency_head(typed), {}
    for arm in arms:
        seen, suffix = features[arm.label], _suffix(sample)
        protocol = {**_protocol(arm, sample, "test"), "against": DENSE}
        if arm.label != DENSE:
            results[arm.label] += feature_agreement(
                features[DENSE], seen, arm.where, suffix, protocol
            )
        if head is not None and seen.tokens is not None:
            with torch.inference_mode():
                maps[arm.label] = head(seen.tokens)
            if arm.label != DENSE:
                results[arm.label] += map_agreement(
                    maps[DENSE], maps[arm.label], arm.where, suffix, protocol
                )
    if not {DENSE, PRUNED} <= maps.keys():
        return []
    chosen = range(0, len(sample), max(1, len(sample) // SHOWN))[:SHOWN]
    images = [sample.preprocess.view(sample.image(index)) for index in chosen]
    names = [sample.ids[index].rpartition("/")[2] for index in chosen]
    return strips(images, names, maps[DENSE][list(chosen)], maps[PRUNED][list(chosen)])


def _difference(results: Results) -> Difference | None:
    """Compare the first metric that both dense and pruned have, image by image."""
    dense = {result.metric: result for result in results.get(DENSE, [])}
    for pruned in results.get(PRUNED, []):
        if pruned.metric in dense:
            return paired_difference(dense[pruned.metric], pruned)
    return None
