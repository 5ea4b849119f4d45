"""Longer learning runs on any CUDA machine, in slices: `make gpu-learn`, again and again until it
says that it is done.

    maskllm    2:4 masks for frozen weights through the whole model, cross-entropy and distillation
    finetune   the survivors of a one-shot mask trained against the dense model

Both learn on the packaged Wikipedia sample and on text that the dense model writes, which fills up
what that lacks. A slice ends by itself before its limit and goes on from the last checkpoint of the
run folder when it is called again: keep the folder between slices. The held-out loss is watched;
the best masks so far win. After every slice `FOLDER/JOB.json` tells how far it came (a copy goes to
`$OUT` where that is set); a finished job is scored as `oneshot.py` does, and
`results/gpu/learn-JOB.json` holds all of it. Without `--dry` a GPU is needed. `--dry` learns a few
steps of a given tiny model on a processor and means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.files import read_json, write_json
from benchmarks.gap import gap_closed, gap_ends
from benchmarks.gpu.bundle import BUNDLE, ROOT, BundleError, use

MINUTES = 8.0
RESERVE = 45
"""Seconds for loading and for the last checkpoint."""
RESULTS = ROOT / "results"
DATA = {"data": "wikipedia+generated", "samples": 4096, "length": 1024, "batch": 8}
"""The sample of Wikipedia has 524 such windows; the model writes the rest."""
JOBS: dict[str, dict[str, Any]] = {
    "maskllm": {
        "method": "maskllm",
        "calibration": DATA,
        "learn": {
            "objective": "global",
            "steps": 2000,
            "batch": 32,
            "evaluate_every": 50,
            "checkpoint_every": 50,
            "holdout": 0.02,
        },
    },
    "finetune": {
        "method": "group-obs",
        "sequential": True,
        "calibration": DATA,
        "refine": [
            {"name": "refit"},
            {
                "name": "finetune",
                "how": "fixed",
                "steps": 2000,
                "batch": 32,
                "evaluate_every": 50,
                "checkpoint_every": 50,
                "holdout": 0.02,
                "prior_samples": 256,
            },
        ],
    },
}
DRY_DATA = {"data": "generated", "samples": 8, "length": 16, "batch": 2}
DRY = {
    "maskllm": {
        "method": "maskllm",
        "calibration": DRY_DATA,
        "learn": {
            "objective": "global",
            "steps": 6,
            "evaluate_every": 2,
            "checkpoint_every": 1,
            "priors": ["magnitude"],
        },
    },
    "finetune": {
        "method": "magnitude",
        "calibration": DRY_DATA,
        "refine": [
            {
                "name": "finetune",
                "how": "fixed",
                "steps": 6,
                "evaluate_every": 2,
                "checkpoint_every": 1,
                "warmup": 1,
            }
        ],
    },
}


class SliceOver(Exception):
    """The time of this slice is used up; the checkpoint is written."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--job", action="append", choices=JOBS, help="left out: all; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu-learn"),
        help="folder of runs and checkpoints [default: runs/gpu-learn]",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of one slice")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", help="calibration text instead of the job's own")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(arguments)
    if not given.dry and not has_gpu():
        print(
            "gpu-learn: there is no CUDA device that this Python's torch can use (docs/gpu.md).",
            file=sys.stderr,
        )
        return 1
    try:  # beside the runs, where the next slice finds what the model wrote
        use(Path() / "none" if given.dry else given.bundle, given.out)
    except BundleError as error:
        print(f"gpu-learn: {error}", file=sys.stderr)
        return 1
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
        print(
            f"{job}: {state['state']}, step {state['step']} of {state['steps']}, held-out loss {state['best']} "
            f"(prior {state['prior']})",
            flush=True,
        )
        if state["state"] != "done":
            print("call it again to go on", flush=True)
            return 0
    return 0


def slice_of(job: str, given: argparse.Namespace, end: float) -> dict[str, Any]:
    """One slice of one job; writes `JOB.json`."""
    from nmsparse_deploy.find.prune import prune
    from nmsparse_deploy.recipe import Prune, validate
    from nmsparse_deploy.system.environment import environment, now
    from nmsparse_deploy.system.gpu_clock import libraries

    wanted = json.loads(json.dumps((DRY if given.dry else JOBS)[job]))
    wanted["calibration"]["data"] = given.data or wanted["calibration"]["data"]
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
    found = {
        "job": job,
        "dry": given.dry,
        "state": state,
        "recipe": spec.model_dump(mode="json"),
        **how_far(given.out / job, spec),
    }
    if state == "done" and not given.dry:
        earlier = read_json(given.out / f"{job}.json") or {}
        if (
            "scores" in earlier and earlier["recipe"] == found["recipe"]
        ):  # later slices are for the other jobs
            found = earlier
        else:
            found |= {
                "scores": scores(given.out / job),
                "date": now(),
                "libraries": libraries(),
                **environment(),
            }
        (RESULTS / "gpu").mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"gpu/learn-{job}.json", found)
    for folder in filter(None, (given.out, os.environ.get("OUT"))):
        write_json(Path(folder) / f"{job}.json", found)
    return found


def scores(run: Path) -> dict[str, Any]:
    """Perplexity on the held-out texts that are there, and the share of the gap between SparseGPT
    and dense that is closed; both ends of it are those of `results/baseline-smollm2-135m.json`,
    measured on a processor."""
    import torch
    from safetensors.torch import load_file

    from nmsparse_deploy import models
    from nmsparse_deploy.data.text import check_disjoint, evaluation_sample, load_text
    from nmsparse_deploy.errors import UsageError
    from nmsparse_deploy.measure.evaluate.perplexity import perplexity

    baseline = json.loads((RESULTS / "baseline-smollm2-135m.json").read_text())
    protocol, ends = baseline["protocol"], gap_ends(baseline)
    seen, loaded = (
        load_file(run / "calibration.safetensors")["ids"],
        models.load(str(run / "model")),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.module.to(device, torch.bfloat16)
    found: dict[str, Any] = {}
    for text in protocol["texts"]:
        try:
            sample = evaluation_sample(
                load_text(text), loaded.processor, protocol["tokens"], protocol["context"]
            )
        except UsageError as error:
            found[text] = {"not_measured": error.message}
            continue
        check_disjoint(seen, sample.ids)
        value = perplexity(loaded.module, sample, device.type, f"{run.name} {text}").value
        found[text] = {"ppl": value, "gap_closed": gap_closed(math.log(value), ends[text])}
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
    return {
        "step": told.get("step", told.get("steps", 0)),
        "steps": steps,
        "prior": told.get("prior"),
        "best": told.get("best"),
        "best_step": told.get("best_step"),
        "history": told.get("history"),
        "seconds": told.get("seconds"),
    }


def _record(run: Path) -> dict[str, Any]:
    """The newest checkpoint's record."""
    from safetensors import safe_open

    from nmsparse_deploy.find.learn.checkpoint import RECORD

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
