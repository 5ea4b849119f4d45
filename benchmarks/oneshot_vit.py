"""One-shot recipes on the packaged vision transformer.

`python benchmarks/oneshot_vit.py --out results/oneshot-vit.json` prunes it to 2:4 on 256 training pictures and asks, on
held-out ones, how accurate a linear probe on its features is (a new probe, and the one that was fitted to the dense
model), and how well features and saliency maps agree with the dense model's. Three seeds of the calibration sample.
Rows that the output file already holds under the same recipe are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from baseline import say
from oneshot import recipe, refined

from nmsparse_deploy.pipeline import evaluate
from nmsparse_deploy.prune import prune
from nmsparse_deploy.recipe import Evaluate, Prune, fingerprint, validate
from nmsparse_deploy.registry import METHODS
from nmsparse_deploy.rundir import environment, now

MODEL = "vit"
ROWS: dict[str, dict[str, Any]] = {
    "magnitude": refined("magnitude"), "wanda": refined("wanda"), "sparsegpt": refined("sparsegpt"),
    "group-obs": refined("group-obs"), "closed-form": recipe("closed-form"), "best": recipe("best"),
}
CALIBRATION = {"data": "fashion-mnist+tiny-photos", "samples": 256, "batch": 16}


def spec_of(name: str, seed: int) -> Prune:
    return validate(Prune, {**ROWS[name], "calibration": {**CALIBRATION, "seed": seed}})


def measure(name: str, seed: int, runs: Path) -> dict[str, Any]:
    """Prune and evaluate; every metric of the pruned model, and of the dense one."""
    run = prune(MODEL, spec_of(name, seed), runs / f"{name}-{seed}", progress=say)
    found = evaluate(run, Evaluate(), say)["results"]
    values = {label: {row["metric"]: {key: row[key] for key in ("value", "standard_error", "samples")}
                      for row in found[label]} for label in ("dense", "pruned")}
    facts = run.manifest()["stages"]["prune"]
    return {"method": name, "seed": seed, "fingerprint": fingerprint(MODEL, spec_of(name, seed)),
            "seconds": facts["seconds"], "peak_memory_mb": facts["peak_memory_mb"], **values}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of every metric, with the spread between seeds."""
    lines = [{"method": "dense", "seeds": 0, "seconds": 0.0,
              **{metric: {"mean": row["value"], "seed_spread": None} for metric, row in rows[0]["dense"].items()}}]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {"method": name, "seeds": len(mine),
                                "seconds": statistics.median(row["seconds"] for row in mine)}
        for metric in mine[0]["pruned"]:
            values = [row["pruned"][metric]["value"] for row in mine]
            line[metric] = {"mean": statistics.fmean(values),
                            "seed_spread": statistics.stdev(values) if len(values) > 1 else None}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/oneshot-vit"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(ROWS), default=[])
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    have = {(row["method"], row["seed"]): row for row in kept}
    for seed in range(options.seeds):
        for name in options.only or ROWS:
            if seed and METHODS.load(ROWS[name]["method"]).needs == "none":
                continue
            if have.get((name, seed), {}).get("fingerprint") != fingerprint(MODEL, spec_of(name, seed)):
                have[name, seed] = measure(name, seed, options.runs)
            rows = [have[key] for key in sorted(have, key=lambda key: (list(ROWS).index(key[0]), key[1]))]
            result = {"command": f"python benchmarks/oneshot_vit.py --out results/{options.out.name}", "date": now(),
                      "model": MODEL, "pattern": "2:4", "calibration": CALIBRATION, **environment(),
                      "table": table(rows), "rows": rows}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for line in result["table"]:
        print(line["method"], *(f"{metric.partition('@')[0]} {line[metric]['mean']:.3f}" for metric in line
                                if isinstance(line[metric], dict)), flush=True)


if __name__ == "__main__":
    main()
