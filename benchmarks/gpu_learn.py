"""Longer learning runs on any CUDA machine, in slices: `make gpu-learn`, again and again until it says that it is done.

    maskllm    2:4 masks for frozen weights through the whole model, cross-entropy and distillation
    finetune   the survivors of a one-shot mask trained against the dense model

A slice ends by itself before its limit and goes on from the last checkpoint of the run folder when it is called again.
The held-out loss is watched; the best masks so far win. After every slice `FOLDER/JOB.json` tells how far it came.
Without `--dry` a GPU is needed. `--dry` learns a few steps of a given tiny model on a processor and means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.files import write_json
from benchmarks.gpu_bundle import BUNDLE, BundleError, unpacked

MINUTES = 8.0
RESERVE = 45
"""Seconds for loading and for the last checkpoint."""
JOBS: dict[str, dict[str, Any]] = {
    "maskllm": {"method": "maskllm", "calibration": {"samples": 1024, "length": 1024, "batch": 8},
                "learn": {"objective": "global", "steps": 2000, "batch": 32, "evaluate_every": 50,
                          "checkpoint_every": 50, "holdout": 0.05}},
    "finetune": {"method": "sparsegpt", "calibration": {"samples": 1024, "length": 1024, "batch": 8},
                 "refine": [{"name": "finetune", "how": "fixed", "steps": 2000, "batch": 32, "evaluate_every": 50,
                             "checkpoint_every": 50, "holdout": 0.05}]}}
DRY = {"maskllm": {"method": "maskllm", "calibration": {"samples": 8, "length": 16, "batch": 2},
                   "learn": {"objective": "global", "steps": 6, "evaluate_every": 2, "checkpoint_every": 1,
                             "priors": ["magnitude"]}},
       "finetune": {"method": "magnitude", "calibration": {"samples": 8, "length": 16, "batch": 2},
                    "refine": [{"name": "finetune", "how": "fixed", "steps": 6, "evaluate_every": 2,
                                "checkpoint_every": 1, "warmup": 1}]}}


class SliceOver(Exception):
    """The time of this slice is used up; the checkpoint is written."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", action="append", choices=JOBS, help="left out: all; may be repeated")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu-learn")),
                        help="folder of runs and checkpoints [default: $OUT, or runs/gpu-learn]")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of one slice")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="wikipedia", help="calibration text")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(arguments)
    if not given.dry and not has_gpu():
        print("gpu-learn: there is no CUDA device that this Python's torch can use (docs/gpu.md).", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as work:
        try:
            environment = unpacked(given.bundle, Path(work)) if given.bundle.is_dir() and not given.dry else {}
        except BundleError as error:
            print(f"gpu-learn: {error}", file=sys.stderr)
            return 1
        os.environ.update({name: value for name, value in environment.items() if name != "PYTHONPATH"})
        sys.path[:0] = [environment["PYTHONPATH"]] if "PYTHONPATH" in environment else []
        return learn(given)


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def learn(given: argparse.Namespace) -> int:
    """Go on with the first job that is not done; 0 when all are, or this slice did its share."""
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes - (0 if given.dry else RESERVE)
    for job in given.job or JOBS:
        state = slice_of(job, given, end)
        print(f"{job}: {state['state']}, step {state['step']} of {state['steps']}, held-out loss {state['best']} "
              f"(prior {state['prior']})", flush=True)
        if state["state"] != "done":
            print("call it again to go on", flush=True)
            return 0
    return 0


def slice_of(job: str, given: argparse.Namespace, end: float) -> dict[str, Any]:
    """One slice of one job; writes `JOB.json`."""
    from nmsparse_deploy.prune import prune
    from nmsparse_deploy.recipe import Prune, validate

    wanted = json.loads(json.dumps((DRY if given.dry else JOBS)[job]))
    wanted["calibration"]["data"] = given.data
    spec = validate(Prune, wanted)

    def progress(text: str, done: int = 0, total: int = 0) -> None:
        print(f"{text} [{done}/{total}]" if total else text, file=sys.stderr, flush=True)
        if time.monotonic() > end and kept(given.out / job):
            raise SliceOver

    try:
        prune(given.model, spec, given.out / job, progress=progress)
        state = "done"
    except SliceOver:
        state = "to be continued"
    found = {"job": job, "dry": given.dry, "state": state, "recipe": spec.model_dump(mode="json"),
             **how_far(given.out / job, spec)}
    write_json(given.out / f"{job}.json", found)
    return found


def kept(run: Path) -> bool:
    """Would a stop lose nothing but the last minutes? Finished blocks and checkpoints survive."""
    return bool(_record(run)) or any((run / "blocks").glob("*.safetensors"))


def how_far(run: Path, spec: Any) -> dict[str, Any]:
    """Steps, losses and their history, from the checkpoint or the finished run."""
    told = _record(run)
    if not told:
        told = _finished(run)
    steps = spec.learn.steps if spec.learn is not None else spec.finetune.steps
    return {"step": told.get("step", told.get("steps", 0)), "steps": steps, "prior": told.get("prior"),
            "best": told.get("best"), "best_step": told.get("best_step"), "history": told.get("history"),
            "seconds": told.get("seconds")}


def _record(run: Path) -> dict[str, Any]:
    """The newest checkpoint's record."""
    from safetensors import safe_open

    from nmsparse_deploy.train.checkpoint import RECORD

    for path in sorted(run.rglob("*.safetensors"), key=lambda file: -file.stat().st_mtime):
        with safe_open(path, framework="pt") as file:
            if RECORD in (file.metadata() or {}):
                return dict(json.loads(file.metadata()[RECORD]))
    return {}


def _finished(run: Path) -> dict[str, Any]:
    """The facts that the finished run kept about its training."""
    path = run / "refinements.json"
    told = json.loads(path.read_text()) if path.is_file() else []
    return next((row for row in reversed(told) if "history" in row and "best" in row), {})


if __name__ == "__main__":
    sys.exit(main())
