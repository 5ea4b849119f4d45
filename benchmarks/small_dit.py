"""One-shot recipes on a small diffusion transformer that is trained here.

`python benchmarks/small_dit.py --out results/dit-small.json` trains it (`small_dit_model.py`; an
earlier training in `--runs` is kept), prunes it to 2:4 on 256 training pictures, three seeds of the
calibration sample, and tells for every recipe the error of its predictions on held-out pictures by
timestep, how far samples from the same noise move, and how far samples are from real pictures: the
Frechet distance on the 64 features of a small classifier of Fashion-MNIST. That is not FID, and
compares nothing outside this file. Two images, a sheet of samples and the plot by timestep, go into
`--images`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from baseline import say
from files import write_json
from oneshot import recipe, refined
from small_dit_model import CLASSES, DATA, Classifier, classifier, pictures, train

from nmsparse_deploy import models
from nmsparse_deploy.data.images import check_images_disjoint
from nmsparse_deploy.data.latents import NoisedSample
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.denoise import draw, predict, starting_noise
from nmsparse_deploy.measure.evaluate.diffusion import by_timestep, held_out, relative
from nmsparse_deploy.measure.evaluate.frechet import frechet_distance
from nmsparse_deploy.measure.evaluate.png import by_timestep_plot, sheet
from nmsparse_deploy.measure.evaluate.result import bootstrap_error
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.registry import METHODS
from nmsparse_deploy.system.environment import environment, now

ROWS: dict[str, dict[str, Any]] = {
    "magnitude": refined("magnitude"),
    "wanda": refined("wanda"),
    "sparsegpt": refined("sparsegpt"),
    "closed-form": recipe("closed-form"),
}
CALIBRATION = {"data": DATA, "samples": 256, "batch": 32}
HELD_OUT, REAL, DRAWN, STEPS, GUIDANCE, SEEDS = 500, 1000, 200, 20, 2.0, 3


def spec_of(name: str, seed: int) -> Prune:
    return validate(Prune, {**ROWS[name], "calibration": {**CALIBRATION, "seed": seed}})


def predictions(
    model: LoadedModel, dense: torch.Tensor | None, sample: NoisedSample
) -> tuple[dict[str, Any], Any]:
    """Errors on the held-out pictures, overall and by timestep; and the predictions."""
    told = predict(model, sample.inputs)
    error = (told - sample.target).square().flatten(1).mean(1)
    values = {"error": error} if dense is None else {"error": error, "shift": relative(told, dense)}
    means = {
        f"denoising_{name}" if name == "error" else f"prediction_{name}": float(found.mean())
        for name, found in values.items()
    }
    return {**means, "timesteps": by_timestep(sample, values)}, told


def samples(
    model: LoadedModel,
    dense: torch.Tensor | None,
    viewer: Classifier,
    real: torch.Tensor,
    count: int,
) -> tuple[dict[str, Any], torch.Tensor]:
    """What samples from the same noise look like to the classifier."""
    labels = torch.arange(count) % CLASSES
    found = draw(
        model,
        starting_noise(model, count),
        {"class_labels": labels},
        {"class_labels": torch.tensor(CLASSES)},
        STEPS,
        GUIDANCE,
    )
    with torch.no_grad():
        features, logits = viewer(found.clamp(-1, 1))
        truth, _ = viewer(real)
    row = {
        "frechet": frechet_distance(features, truth),
        "frechet_standard_error": bootstrap_error(
            lambda index: frechet_distance(features[index], truth), count, 40
        ),
        "recognised": float((logits.argmax(1) == labels).double().mean()),
    }
    return row if dense is None else {
        **row,
        "sample_shift": float(relative(found, dense).mean()),
    }, found


def measure(
    folder: Path, runs: Path, seeds: int, drawn_count: int, held: int
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], float]:
    """Every row, the samples of seed 0 by name, the plot's rows by name, and the classifier's
    accuracy."""
    viewer, accuracy = classifier()
    dense = models.load(str(folder))
    sample, real = held_out(dense, DATA, held), pictures("test", REAL)[0]
    start, told = predictions(dense, None, sample)
    looks, drawn = samples(dense, None, viewer, real, drawn_count)
    rows, sheets = (
        [{"method": "dense", "seed": None, "seconds": 0.0, **start, **looks}],
        {"dense": drawn},
    )
    lines = {"dense": start["timesteps"]}
    for name in ROWS:
        for seed in range(seeds):
            if seed and METHODS[ROWS[name]["method"]].needs == "none":
                continue
            run = prune(str(folder), spec_of(name, seed), runs / f"{name}-{seed}", progress=say)
            record = run.manifest().stages["prune"]
            if record.calibration:
                hashes = [bytes.fromhex(digest) for digest in record.calibration["sha256"]]
                check_images_disjoint(
                    torch.tensor([list(digest) for digest in hashes]), sample.images.hashes
                )
            pruned = models.load(str(run / "model"))
            row, _ = predictions(pruned, told, sample)
            if seed == 0:
                looks, sheets[name] = samples(pruned, drawn, viewer, real, drawn_count)
                row, lines[name] = {**row, **looks}, row["timesteps"]
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    "seconds": record.seconds,
                    "layers": record.layers,
                    **row,
                }
            )
            print(
                name,
                seed,
                {key: value for key, value in rows[-1].items() if isinstance(value, float)},
                flush=True,
            )
    return rows, sheets, lines, accuracy


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds with the spread between seeds; samples are drawn for the first seed only."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {
            "method": name,
            "seeds": len(mine) if mine[0]["seed"] is not None else 0,
            "seconds": statistics.median(row["seconds"] for row in mine),
        }
        for metric in ("denoising_error", "prediction_shift"):
            values = [row[metric] for row in mine if metric in row]
            line[metric] = (
                {
                    "mean": statistics.fmean(values),
                    "seed_spread": statistics.stdev(values) if len(values) > 1 else None,
                }
                if values
                else None
            )
        lines.append(
            {
                **line,
                **{
                    key: mine[0].get(key)
                    for key in ("sample_shift", "frechet", "frechet_standard_error", "recognised")
                },
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--images", type=Path, help="folder of the two images; left out: beside the JSON"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/dit-small"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--drawn", type=int, default=DRAWN)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument(
        "--steps", type=int, help="training steps; left out: those of the published figures"
    )
    options = parser.parse_args()
    folder, record = options.runs / "dense", options.runs / "training.json"
    if not record.is_file():
        told = train(folder, options.steps) if options.steps else train(folder)
        record.write_text(json.dumps(told) + "\n")
    start = time.perf_counter()
    rows, sheets, lines, accuracy = measure(
        folder, options.runs, options.seeds, options.drawn, options.held_out
    )
    result = {
        "command": f"python benchmarks/small_dit.py --out results/{options.out.name}",
        "date": now(),
        "pattern": "2:4",
        "training": json.loads(record.read_text()),
        "seconds": round(time.perf_counter() - start, 1),
        "calibration": CALIBRATION,
        "protocol": {
            "held_out": options.held_out,
            "drawn": options.drawn,
            "denoising_steps": STEPS,
            "guidance": GUIDANCE,
            "scheduler": "DDIM",
            "features": f"64 features of a small classifier of Fashion-MNIST (test accuracy {accuracy:.3f}), "
            f"{REAL} real test pictures; not FID",
        },
        **environment(),
        "table": table(rows),
        "rows": rows,
    }
    write_json(options.out, result)
    image = (options.images or options.out.parent) / options.out.stem
    sheet([found[:CLASSES] for found in sheets.values()]).save(f"{image}.png")
    parts = [
        {
            "from": row["from"],
            "to": row["to"],
            **{name: found[place]["error"] for name, found in lines.items()},
        }
        for place, row in enumerate(lines["dense"])
    ]
    by_timestep_plot(parts, list(lines), "mean squared error of the prediction").save(
        f"{image}-timesteps.png"
    )
    for line in result["table"]:
        print({key: value for key, value in line.items() if value is not None}, flush=True)


if __name__ == "__main__":
    main()
