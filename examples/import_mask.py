"""Bring masks that another program found into a run, where every other command can use them.

    python examples/import_mask.py MODEL_FOLDER --out runs/imported

Here the other program is `masks_from_elsewhere`: it keeps the two largest of every four weights and
writes them as MaskLLM does, one array of packed bits for each weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import nmsparse_deploy as nms


def masks_from_elsewhere(folder: Path, file: Path) -> None:
    """Write `file`, a .npz with `NAME.mask`: eight weights to a byte, the first in the highest
    bit."""
    weights = load_file(folder / "model.safetensors")
    masks = {}
    for row in nms.inspect(
        str(folder), "2:4"
    ).pruned():  # which weights are pruned, and along which axis
        groups = np.moveaxis(np.abs(weights[row.target.name]), row.target.axis, -1)
        ranks = groups.reshape(*groups.shape[:-1], -1, 4).argsort(-1).argsort(-1)
        mask = np.moveaxis((ranks >= 2).reshape(groups.shape), -1, row.target.axis)
        masks[f"{row.target.name}.mask"] = np.packbits(mask)
    np.savez_compressed(file, **masks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument(
        "--masks", type=Path, default=Path("masks.npz"), help="where the masks are written"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/imported"))
    options = parser.parse_args()

    masks_from_elsewhere(options.model, options.masks)
    done = nms.import_result(str(options.model), options.masks, out=options.out)
    print(done.summary())
    assert all(report.ok for report in nms.verify(done.run))


if __name__ == "__main__":
    main()
