"""Learning on the demo model in minutes: masks block by block, and masked distillation of the
whole.

`python benchmarks/learned_demo.py` writes results/learned-smollm2-135m.json, with the protocol,
texts and ends of the scale of `baseline.py` and `oneshot.py`, and one seed. A row gets a quarter of
an hour of optimiser steps, or half of one: a rehearsal of a few steps says how many that is on this
machine, and the count is kept, so that a run that was stopped goes on. What comes before the first
step (priors, the closed form) is timed as well but not limited. Fine-tuning reads as many windows
as its steps ask for; the closed form before it sees the 64 of the protocol.

Rows that the output file holds for the same recipe are kept. `--only NAME` measures some rows;
`--steps N` leaves the rehearsal out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import oneshot
from baseline import CONTEXT, TOKENS, say
from files import write_json
from gap import gap_ends
from oneshot import BASELINE, ROOT, recipe, row, spec_of, table

from nmsparse_deploy import models
from nmsparse_deploy.data.text import evaluation_sample, load_text
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Prune, fingerprint, validate
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.environment import environment, now

SAMPLES, BATCH, HELD_OUT = 64, 4, 2
"""Windows of 512 tokens for a block, windows that pass at a time, and batches that judge a whole
model."""
REHEARSAL, MOST = 8, 1048 // BATCH - HELD_OUT
"""Steps of a rehearsal, and as many as the text has windows for."""
MINUTES = {
    "maskllm, a block at a time": 15,
    "closed-form + finetune": 15,
    "closed-form + finetune, half an hour": 30,
    "proxsparse-local": 0,
}
"""The last one takes no steps: it is the local form of a learned method's regulariser."""


def section(name: str, steps: int) -> dict[str, Any]:
    """The prune section of a row that takes `steps` optimiser steps (of every block, or of the
    model)."""
    judged = max(1, steps // 3)
    if name.startswith("maskllm"):
        found = recipe("maskllm")
        learn = {
            **found["learn"],
            "steps": steps,
            "evaluate_every": judged,
            "checkpoint_every": steps,
        }
        return {**found, "learn": learn, "calibration": {"samples": SAMPLES, "batch": BATCH}}
    if "finetune" in name:
        found, batches = recipe("closed-form"), steps + HELD_OUT
        step = {
            "name": "finetune",
            "how": "fixed",
            "steps": steps,
            "warmup": min(steps - 1, 5),
            "evaluate_every": judged,
            "checkpoint_every": judged,
            "holdout": HELD_OUT / batches,
            "prior_samples": SAMPLES,
        }
        return {
            **found,
            "refine": [*found["refine"], step],
            "calibration": {"samples": batches * BATCH, "batch": BATCH},
        }
    return {"method": name}


def rehearsed(name: str, runs: Path) -> float:
    """Seconds of an optimiser step: of all blocks together, or of the model. The mask is judged at
    the end only."""
    rehearsal = section(name, REHEARSAL)
    calibration = {
        **rehearsal["calibration"],
        "data": "wikipedia",
        "samples": (REHEARSAL + HELD_OUT) * BATCH,
    }
    if name.startswith("maskllm"):
        rehearsal |= {
            "include": ["*layers.0.*"],
            "calibration": {**calibration, "samples": SAMPLES},
            "learn": {**rehearsal["learn"], "evaluate_every": REHEARSAL},
        }
    else:
        step = {**rehearsal["refine"][-1], "evaluate_every": REHEARSAL}
        rehearsal |= {
            "method": "magnitude",
            "refine": [step],
            "calibration": calibration,
            "sequential": False,
        }
    run = prune(
        "demo",
        validate(Prune, rehearsal),
        runs / f"rehearsal-{name.replace(' ', '')}",
        progress=say,
    )
    [facts] = run.read_json("refinements.json")
    blocks = len(run.read_json("plan.json")["blocks"]) if name.startswith("maskllm") else 1
    return blocks * facts["seconds"] / facts["steps"]


def steps_of(name: str, runs: Path) -> int:
    """How many steps fit; decided once."""
    file = runs / "steps.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    key = f"{name} {MINUTES[name]}"
    if key not in kept:
        seconds = rehearsed(name, runs)
        kept[key] = min(max(1, int(60 * MINUTES[name] / seconds)), MOST)
        file.write_text(json.dumps(kept))
        print(f"{name}: {seconds:.1f} s a step, so {kept[key]} steps", flush=True)
    return kept[key]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/learned-smollm2-135m.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/learned-demo"))
    parser.add_argument("--only", action="append", choices=list(MINUTES), default=[])
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    baseline = json.loads(BASELINE.read_text())
    texts = baseline["protocol"]["texts"]
    tokenizer = models.load("demo").processor
    samples = {
        text: evaluation_sample(load_text(text), tokenizer, TOKENS, CONTEXT) for text in texts
    }
    ends = gap_ends(baseline)
    kept = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    have = {found["method"]: found for found in kept}
    for name in options.only or MINUTES:
        steps = options.steps or (steps_of(name, options.runs) if MINUTES[name] else 0)
        oneshot.ROWS[name] = section(name, steps)
        if have.get(name, {}).get("fingerprint") == fingerprint("demo", spec_of(name, 0)):
            continue
        print(f"{name}: {steps} steps" if steps else name, flush=True)
        found = row(name, 0, samples, options.runs)
        have[name] = {
            **found,
            "steps": steps,
            "learning": _learning(options.runs / f"{name.replace(' ', '')}-0"),
        }
        rows = [have[one] for one in MINUTES if one in have]
        result = {
            "command": "python benchmarks/learned_demo.py",
            "date": now(),
            "model": "demo",
            "minutes": MINUTES,
            "protocol": baseline["protocol"],
            "ends": ends,
            **environment(),
            "table": table(rows, ends),
            "rows": rows,
        }
        write_json(options.out, result)
    for line in table([have[one] for one in MINUTES if one in have], ends):
        print(
            line["method"],
            *(f"{t} {line[t]['ppl']:.2f} ({line[t]['gap_closed']:.2f})" for t in texts),
            flush=True,
        )


def _learning(folder: Path) -> dict[str, Any]:
    """What was learned, block by block or at once: losses, share of groups that changed, seconds of
    steps."""
    told = (
        [row for row in RunDir(folder).read_json("refinements.json") if "history" in row]
        if (folder / "refinements.json").is_file()
        else []
    )
    if not told:
        return {}
    return {
        "prior": [row["prior"] for row in told],
        "best": [row["best"] for row in told],
        "changed": [row.get("changed") for row in told],
        "seconds": sum(row["seconds"] for row in told),
        "samples_per_step": told[0]["samples_per_step"],
    }


if __name__ == "__main__":
    main()
