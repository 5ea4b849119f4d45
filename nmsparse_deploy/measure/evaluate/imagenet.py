"""Top-1 and top-5 on a folder of labelled images as timm's validation measures them, with timm's
own data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.data.images import check_images_disjoint, content_hash
from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError
from nmsparse_deploy.measure.evaluate.arms import DENSE, PRUNED, Arm
from nmsparse_deploy.measure.evaluate.probe import hits
from nmsparse_deploy.measure.evaluate.result import (
    EvalResult,
    Evaluation,
    TimmRow,
    mean_result,
    paired_difference,
)
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.preprocess import ImagePipeline
from nmsparse_deploy.system.progress import Progress, silent

BATCH = 32


def evaluate_imagenet(
    arms: Sequence[Arm],
    model: LoadedModel,
    folder: str,
    limit: int | None,
    calibration: torch.Tensor | None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure the accuracy of every arm on the same images, each decoded once.

    `folder` holds one folder per class, or a `validation` (or `val`) folder that does. Under `timm`
    come the fields that timm's `validate.py` prints, in percent. Raises `UsageError` when the
    folders cannot be matched with the model's classes, `NmsparseError` when an image was calibrated
    on.
    """
    settings = model.adapter.image_pipeline(model)
    dataset = _dataset(folder, settings, model, limit)
    hashes: list[str] = []
    loader = _loader(dataset, settings, hashes.append if calibration is not None else None)
    right: dict[str, dict[int, list[float]]] = {arm.label: {1: [], 5: []} for arm in arms}
    seen = 0
    for images, classes in _read(loader, folder):
        progress("images of the validation set", seen, len(dataset))
        for arm in arms:
            logits = arm.run({model.input_name: images}).logits
            if logits is None:
                raise UsageError(
                    "The model has no head of its own, so it names no classes.",
                    "leave the protocol out to judge its features by a probe",
                )
            for k, right_so_far in right[arm.label].items():
                right_so_far += hits(logits, classes, k)
        seen += len(classes)
    compared = check_images_disjoint(calibration, hashes) if calibration is not None else None
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    suffix = f"-of{seen}" if limit else ""
    facts = {
        "data": folder,
        "images": seen,
        "classes": len(dataset.reader.class_to_idx),
        **settings,
    }
    rows = {
        arm.label: [
            mean_result(f"imagenet_top{k}{suffix}", hit, arm.where, {**facts, "dtype": arm.dtype})
            for k, hit in right[arm.label].items()
        ]
        for arm in arms
    }
    return Evaluation(
        {**rows},
        {"images_compared": compared, "overlaps": 0},
        samples={"labelled": facts},
        difference=paired_difference(rows[DENSE][0], rows[PRUNED][0]),
        timm={
            label: printed(model.name, tops, parameters, settings) for label, tops in rows.items()
        },
    )


def printed(
    name: str, rows: Sequence[EvalResult], parameters: int, settings: ImagePipeline
) -> TimmRow:
    """Return what timm's `validate.py` prints."""
    top1, top5 = (100 * row.value for row in rows)
    return TimmRow(
        name,
        round(top1, 4),
        round(100 - top1, 4),
        round(top5, 4),
        round(100 - top5, 4),
        round(parameters / 1e6, 2),
        settings["input_size"][-1],
        settings["crop_pct"],
        settings["interpolation"],
    )


def _dataset(folder: str, settings: ImagePipeline, model: LoadedModel, limit: int | None) -> Any:
    try:
        from timm.data import create_dataset
    except ImportError as error:
        raise MissingExtra("timm", "vision", "The protocol 'imagenet'") from error
    if not Path(folder).is_dir():
        raise UsageError(
            f"There is no folder of images '{folder}'.", "--data FOLDER, with one folder per class"
        )
    mode = "RGB" if settings["input_size"][0] == 3 else "L"
    try:
        dataset = create_dataset("", root=folder, split="validation", input_img_mode=mode)
        names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
        table = class_numbers(model, names)
        dataset = create_dataset(
            "", root=folder, split="validation", input_img_mode=mode, class_map=table
        )
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UsageError(
            f"'{folder}' is no folder of labelled images: {reason[:200]}.",
            "one folder per class, with images in it",
        ) from error
    if limit and limit < len(dataset):
        places = torch.linspace(0, len(dataset) - 1, limit).round().long().tolist()
        dataset.reader.samples = [dataset.reader.samples[place] for place in places]
    dataset._max_retries = 1  # timm would put the next image in the place of a damaged one
    return dataset


def class_numbers(model: LoadedModel, names: Sequence[str]) -> dict[str, int]:
    """Match outputs of the head with folders: by the head's labels, or in order where there are as
    many of both.

    Raises `UsageError` otherwise: numbering some folders of many classes from 0 would measure
    nothing.
    """
    table, outputs = _labels(model)
    if all(name in table for name in names):
        return {name: table[name] for name in names}
    if outputs is not None and len(names) != outputs:
        raise UsageError(
            f"There are {len(names)} folders of images, the model's head has {outputs} classes, and "
            f"'{next(name for name in names if name not in table)}' is none of its labels.",
            "name the folders after the model's classes (WordNet ids for ImageNet)",
        )
    return {name: number for number, name in enumerate(names)}


def _labels(model: LoadedModel) -> tuple[dict[str, int], int | None]:
    """Return the head's labels with their numbers, and how many outputs it has."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    numbers, outputs = model.adapter.class_labels(model)
    subset = None if numbers else infer_imagenet_subset(model.module)
    names = ImageNetInfo(subset).label_names() if subset else ()
    return numbers or {str(name): number for number, name in enumerate(names)}, outputs


def _loader(dataset: Any, settings: ImagePipeline, seen: Callable[[str], None] | None) -> Any:
    """Return batches of images and class numbers, in the dataset's order; `seen` gets the content
    hash of each."""
    from timm.data import create_loader

    loader = create_loader(
        dataset,
        input_size=settings["input_size"],
        batch_size=BATCH,
        is_training=False,
        use_prefetcher=False,
        interpolation=settings["interpolation"],
        mean=settings["mean"],
        std=settings["std"],
        num_workers=0,
        persistent_workers=False,
        crop_pct=settings["crop_pct"],
        crop_mode=settings["crop_mode"],
        pin_memory=False,
    )
    transform = dataset.transform

    def watched(image: Any) -> Any:
        if seen is not None:
            seen(content_hash(image))
        return transform(image)

    dataset.transform = watched
    return loader


def _read(loader: Any, folder: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    try:
        yield from loader
    except RuntimeError as error:
        if "Failed to load" not in str(error):
            raise
        raise NmsparseError(
            f"An image in '{folder}' is damaged.", "remove it; every image has to count once"
        ) from error
