"""Write what was found into a run folder, and check the weights as they are on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import save_file

from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed
from nmsparse_deploy.find.block_file import BlockFile, LayerRecord
from nmsparse_deploy.find.facts import RefinementRecord
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.permutations import Permutations
from nmsparse_deploy.prove import verify_checkpoint
from nmsparse_deploy.prove.report import NOT_CHECKED
from nmsparse_deploy.prove.stored_views import FILE, views_to_json
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.runs.run_dir import RunDir

SPACE = ("consumers", "producers", "segments", "length", "copies")
"""What a permutation file says of a space."""


def write_model(
    run: RunDir,
    loaded: LoadedModel,
    changed: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> None:
    """Write the weights, with everything else that the model's folder had; `changed` reads the
    weights that differ from the files of a streamed model."""
    with run.replacing("model") as folder:
        folder.mkdir()
        loaded.save(folder, changed)
        for name, file in models.carried(loaded).items():
            if not (folder / name).exists():  # what was just written is the pruned model's own
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
    if loaded.stored:
        run.write_json(FILE, views_to_json(loaded.stored))


def write_masks(
    run: RunDir, masks: dict[str, Mask], records: Sequence[LayerRecord], method: str, model: str
) -> MaskSet:
    """Write the masks and the records of the layers."""
    mask_set = MaskSet(
        masks, {"method": method, "recipe": run.manifest().fingerprint, "model": model}
    )
    with run.replacing("masks.safetensors") as path:
        mask_set.save(path)
    run.write_json("layers.json", [record.to_json() for record in records])
    return mask_set


def write_blocks(
    run: RunDir,
    loaded: LoadedModel,
    spec: Prune,
    files: Sequence[BlockFile],
    records: Sequence[LayerRecord],
    refinements: Sequence[RefinementRecord],
    retuned: Mapping[str, Mask],
) -> MaskSet:
    """Write the model that finished blocks add up to, with the masks that fine-tuning changed in
    `retuned`."""
    write_model(
        run,
        loaded,
        {name: read for file in files for name, read in file.parameters(loaded.module).items()},
    )
    masks = write_masks(
        run, stored_masks(files) | dict(retuned), records, spec.method, loaded.source
    )
    if spec.wbits:
        grid = json.dumps(
            {"bits": spec.wbits, "group": spec.wgroup}
        )  # one key: several come in any order
        with run.replacing("scales.safetensors") as path:
            save_file(
                {name: scales for file in files for name, scales in file.scales().items()},
                path,
                {"grid": grid},
            )
    if orders := {key: order for file in files for key, order in file.orders().items()}:
        spaces = [
            {key: space[key] for key in SPACE}
            for record in refinements
            if record.name == "permute"
            for space in record.facts["spaces"]
        ]
        with run.replacing("permutations.safetensors") as path:
            Permutations(orders, spaces).save(path)
    if refinements:
        run.write_json("refinements.json", [record.to_json() for record in refinements])
    return masks


def stored_masks(files: Sequence[BlockFile]) -> dict[str, Mask]:
    """Read the masks of finished blocks by parameter name."""
    return {name: mask for file in files for name, mask in file.masks().items()}


def verify_model(run: RunDir, masks: MaskSet, how: str) -> None:
    """Check the weights as they are on disk and record it. Raises `CheckFailed` when they break a
    mask."""
    report = verify_checkpoint(run / "model", masks, stored=run.stored_views())
    run.write_json("verify.json", {"reports": [report.to_json()], "not_checked": list(NOT_CHECKED)})
    if not report.ok:
        raise CheckFailed(f"The {how} model fails verification: {report.summary()}")
