"""One recipe under two commits, on one machine, in turn:
`python benchmarks/commits.py 6ea5a83 --recipe closed-form --out results/commits-cpu.json`.

The older commit is checked out beside this tree. Both prune the demo model with the same
calibration samples, the order swapped from seed to seed; both models are scored by this tree, on
the texts of `baseline.py`. Wall and processor seconds are those of the prune alone, model and text
loaded. A finished seed is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from baseline import held_out, score
from files import read_json, write_json

from nmsparse_deploy.system.environment import environment, now

ROOT = Path(__file__).parent.parent
PRUNE = """
import json, sys, time
from pathlib import Path
import nmsparse_deploy as nms
recipe, seed, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
prune = nms.Recipe.load(recipe).prune
calibration = prune.calibration.model_copy(update={"seed": seed})
cpu = time.process_time()
run = nms.prune("demo", prune.model_copy(update={"calibration": calibration}), out)
cpu, stage = time.process_time() - cpu, json.loads((run / "manifest.json").read_text())["stages"]["prune"]
print(json.dumps({"seconds": stage["seconds"], "cpu_seconds": cpu, "peak_memory_mb": stage["peak_memory_mb"]}))
"""


def pruned(tree: Path, recipe: Path, seed: int, out: Path) -> dict[str, Any]:
    """Prune in a process of its own, with the package of `tree`."""
    done = subprocess.run(
        [sys.executable, "-c", PRUNE, str(recipe), str(seed), str(out)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tree,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def commit_of(name: str) -> str:
    return subprocess.check_output(
        ["git", "rev-parse", "--short", name], cwd=ROOT, text=True
    ).strip()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios before : after of each seed, and the difference of log perplexities beside its
    spread."""
    texts = rows[0]["before"]["scores"]
    moved = {
        text: [
            math.log(row["after"]["scores"][text]["value"] / row["before"]["scores"][text]["value"])
            for row in rows
        ]
        for text in texts
    }
    return {
        "speedup": [row["before"]["seconds"] / row["after"]["seconds"] for row in rows],
        "cpu_ratio": [row["before"]["cpu_seconds"] / row["after"]["cpu_seconds"] for row in rows],
        "log_perplexity_change": {
            text: {
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
            }
            for text, values in moved.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="the older commit")
    parser.add_argument("--recipe", default="closed-form", help="of recipes/, in this tree")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results/commits-cpu.json")
    options = parser.parse_args()
    base, head = commit_of(options.base), commit_of("HEAD")
    kept = read_json(options.out) or {}
    same = [kept.get(key) for key in ("base", "head", "recipe")] == [base, head, options.recipe]
    rows = kept["seeds"] if same else []
    samples, recipe = held_out(), ROOT / f"recipes/{options.recipe}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / "base"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(older), base], cwd=ROOT, check=True
        )
        try:
            for seed in range(len(rows), options.seeds):
                trees = {"before": older, "after": ROOT}
                row: dict[str, Any] = {"seed": seed}
                for side in sorted(trees) if seed % 2 else sorted(trees, reverse=True):
                    out = Path(folder) / f"{side}-{seed}"
                    row[side] = pruned(trees[side], recipe, seed, out)
                    row[side]["scores"] = score(str(out / "model"), samples, f"{side} {seed}")
                rows.append(row)
                write_json(
                    options.out,
                    {
                        "created": now(),
                        **environment(),
                        "base": base,
                        "head": head,
                        "recipe": options.recipe,
                        "summary": summary(rows),
                        "seeds": rows,
                    },
                )
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(older)], cwd=ROOT, check=True
            )
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
