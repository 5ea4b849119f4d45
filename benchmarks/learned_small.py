"""Learned masks, masked fine-tuning and one-shot pruning of one small language model, from the same
start.

`python benchmarks/learned_small.py` writes results/learned-small.json. A Llama of 0.85 M prunable
weights is trained on packaged text first (`small_model.py`). Every row then prunes it to 2:4. What
learns starts at Wanda's mask and sees the same `STEPS * BATCH * LENGTH` tokens; the loss of the
hard mask (or of the fine-tuned weights) on held-out windows is followed on the way, over tokens and
over minutes of learning. The score is the loss on articles that nothing here was trained,
calibrated or judged on. Three seeds of the calibration sample, data order and noise.

A row is measured once: rows that the output file holds under the same recipe and for the same dense
model are kept, so the command goes on where it was stopped. `--only NAME` measures some rows,
`--seeds N` fewer seeds, `--quick` a few steps of everything, to see that it runs (into another
file).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

from files import write_json
from oneshot import recipe
from small_model import LENGTH, texts, trained

from nmsparse_deploy import models
from nmsparse_deploy.data.text import TokenSample, evaluation_sample
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.measure.evaluate.perplexity import perplexity
from nmsparse_deploy.recipe import Prune, fingerprint, validate
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.memory import peak_since_reset_mb, reset_peak

ROOT = Path(__file__).parent.parent
STEPS, BATCH, HELD_OUT, EVERY = 160, 8, 10, 20
"""Optimiser steps, windows in each, held-out batches of as many, and steps between judgements."""
TEST_TOKENS = 256 * LENGTH
PRIOR = "wanda"
PASSES = 4.6
"""Forward passes per token of a row that learns: forward and backward (3), the teacher (1),
judgements."""


def learned(**settings: Any) -> dict[str, Any]:
    return {"objective": "global", "priors": [PRIOR], **settings}


def finetuned(how: str, rate: float) -> list[dict[str, Any]]:
    return [{"name": "finetune", "how": how, "rate": rate, "warmup": 10}]


ROWS: dict[str, dict[str, Any]] = {
    "wanda": {"method": PRIOR},
    "magnitude": {"method": "magnitude"},
    "sparsegpt": {"method": "sparsegpt"},
    "proxsparse-local": {"method": "proxsparse-local"},
    "closed-form": recipe("closed-form"),
    "maskllm": {"method": "maskllm", "learn": learned()},
    "proxsparse": {"method": "proxsparse", "learn": learned()},
    "maskpro": {"method": "maskpro", "learn": learned()},
    "wanda + finetune": {"method": PRIOR, "refine": finetuned("fixed", 1e-3)},
    "wanda + finetune, sr-ste": {"method": PRIOR, "refine": finetuned("sr-ste", 1e-3)},
    "wanda + finetune, s-ste": {"method": PRIOR, "refine": finetuned("s-ste", 1e-3)},
    "wanda + finetune, adapters": {"method": PRIOR, "refine": finetuned("adapters", 1e-3)},
}


def spec_of(name: str, seed: int, text: str, steps: int = STEPS) -> Prune:
    """The prune section of a row; `text` is the calibration text's path."""
    batches = steps + HELD_OUT
    training = {
        "steps": steps,
        "holdout": HELD_OUT / batches,
        "evaluate_every": min(EVERY, steps),
        "checkpoint_every": max(1, steps // 2),
    }
    section = dict(ROWS[name])
    if section.get("learn"):
        section["learn"] = {**section["learn"], **training, "prior_samples": batches * BATCH}
    if any(step["name"] == "finetune" for step in section.get("refine", [])):
        section["refine"] = [{**step, **training} for step in section["refine"]]
    calibration = {
        "data": text,
        "samples": batches * BATCH,
        "length": LENGTH,
        "batch": BATCH,
        "seed": seed,
    }
    return validate(Prune, {**section, "compute": "fp32", "calibration": calibration})


def measure(
    name: str, seed: int, dense: Path, sample: TokenSample, runs: Path, steps: int
) -> dict[str, Any]:
    """One row and seed, from the model's folder to the score of what was saved."""
    spec = spec_of(name, seed, str(dense / "calibration.txt"), steps)
    reset_peak()
    run = prune(str(dense), spec, runs / f"{name.replace(' ', '')}-{seed}", progress=say)
    peak = peak_since_reset_mb()
    row = {
        "method": name,
        "seed": seed,
        "seconds": run.manifest().stages["prune"].seconds,
        "peak_memory_mb": peak,
        "changed": _changed(run, RunDir(runs / f"{PRIOR}-{seed}")),
        **_score(str(run / "model"), sample),
    }
    learnt = next((told for told in _refinements(run) if "history" in told), None)
    if learnt:
        batch = learnt["samples_per_step"] * LENGTH
        row["curve"] = [
            {"tokens": int(point["step"]) * batch, "minutes": at / 60, "loss": point["hard"]}
            for point, at in zip(learnt["history"], learnt["judged_at"])
        ]
        row |= {
            "tokens": learnt["steps"] * batch,
            "best_step": learnt["best_step"],
            "peak_memory_mb": learnt["peak_memory_mb"],
            "learning_seconds": learnt["seconds"],
        }
    return row


def _refinements(run: RunDir) -> list[dict[str, Any]]:
    return run.read_json("refinements.json") if (run / "refinements.json").is_file() else []


def _score(folder: str, sample: TokenSample) -> dict[str, float]:
    """Loss on the test articles, nats per token, with its standard error over windows."""
    result = perplexity(models.load(folder).module, sample, "cpu")
    return {"loss": math.log(result.value), "standard_error": result.standard_error / result.value}


def _changed(run: RunDir, prior: RunDir) -> float | None:
    """Share of the groups whose mask is not the common prior's."""
    if not (prior / "masks.safetensors").is_file():
        return None
    mine, start = (MaskSet.load(one / "masks.safetensors").masks for one in (run, prior))
    different = groups = 0
    for name, mask in mine.items():
        apart = (mask.unpack() != start[name].unpack()).movedim(mask.axis, -1)
        moved = apart.reshape(-1, mask.pattern.group).any(-1)
        different, groups = different + int(moved.sum()), groups + len(moved)
    return different / groups


def table(rows: list[dict[str, Any]], dense: float) -> list[dict[str, Any]]:
    """Mean over seeds, spread between them, and the share of Wanda's loss that is gone."""
    lines = []
    worst = statistics.fmean(row["loss"] for row in rows if row["method"] == PRIOR)
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        losses = [row["loss"] for row in mine]
        changed = [row["changed"] for row in mine if row["changed"] is not None]
        lines.append(
            {
                "method": name,
                "seeds": len(mine),
                "loss": statistics.fmean(losses),
                "seed_spread": statistics.stdev(losses) if len(losses) > 1 else None,
                "gap_closed": (worst - statistics.fmean(losses)) / (worst - dense),
                "changed": statistics.fmean(changed) if changed else None,
                "tokens": mine[0].get("tokens", 0),
                "seconds": statistics.median(r["seconds"] for r in mine),
                "peak_memory_mb": max(row["peak_memory_mb"] for row in mine),
            }
        )
    return lines


def say(text: str, done: int = 0, total: int = 0) -> None:
    if "loss" in text:
        print(f"  {text} [{done}/{total}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/learned-small.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/learned-small"))
    parser.add_argument("--only", action="append", choices=list(ROWS), default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps = 4 if options.quick else STEPS
    runs = options.runs.with_name(options.runs.name + "-quick") if options.quick else options.runs
    out = runs / "learned-small.json" if options.quick else options.out
    runs.mkdir(parents=True, exist_ok=True)
    dense = trained(runs / "dense", 20) if options.quick else trained(runs / "dense")
    training = json.loads((dense / "training.json").read_text())
    sample = evaluation_sample(
        texts()["test"], models.load(str(dense)).processor, TEST_TOKENS, LENGTH
    )
    weights = hashlib.sha256((dense / "model.safetensors").read_bytes()).hexdigest()
    pace = training["seconds"] / training["tokens"] / 3
    kept = json.loads(out.read_text()) if out.is_file() else {}
    same = kept.get("dense", {}).get("sha256") == weights
    have = {(row["method"], row["seed"]): row for row in (kept["rows"] if same else [])}
    facts = kept["dense"] if same else {**training, "sha256": weights, **_score(str(dense), sample)}
    for seed in range(options.seeds):
        for name in ROWS:
            wanted = fingerprint("small", spec_of(name, seed, "calibration.txt", steps))
            if (options.only and name not in options.only) or have.get((name, seed), {}).get(
                "fingerprint"
            ) == wanted:
                continue
            learns = bool(ROWS[name].get("learn")) or "finetune" in name
            about = (
                f"about {pace * PASSES * steps * BATCH * LENGTH:.0f} s"
                if learns
                else "a few seconds"
            )
            print(f"{name}, seed {seed}: {about}", flush=True)
            row = measure(name, seed, dense, sample, runs, steps)
            have[name, seed] = {**row, "fingerprint": wanted}
            rows = [
                have[key]
                for key in sorted(have, key=lambda key: (list(ROWS).index(key[0]), key[1]))
            ]
            write(out, facts, rows)
            print(f"  {row['loss']:.4f} nats after {row['seconds']:.0f} s", flush=True)


def write(out: Path, dense: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    lines = table(rows, dense["loss"]) if any(row["method"] == PRIOR for row in rows) else []
    protocol = {
        "pattern": "2:4",
        "tokens": STEPS * BATCH * LENGTH,
        "length": LENGTH,
        "prior": PRIOR,
        "held_out_tokens": HELD_OUT * BATCH * LENGTH,
        "test_tokens": TEST_TOKENS,
        "text": "wikipedia",
    }
    result = {
        "command": "python benchmarks/learned_small.py",
        "date": now(),
        "protocol": protocol,
        "dense": dense,
        **environment(),
        "table": lines,
        "rows": rows,
    }
    write_json(out, result)


if __name__ == "__main__":
    main()
