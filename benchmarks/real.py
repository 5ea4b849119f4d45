"""Two real models beyond the demo's: the packaged vision transformer and the sentence encoder,
three seeds.

`python benchmarks/real.py --out results/real-models.json` prunes both to 2:4 and asks what their
users would. The ViT: how accurate is a linear probe on its features for pictures that were held out
(a new probe, and the one that was fitted to the dense model), how well do features and saliency
maps agree with the dense model's? The encoder: how well do its similarities rank sentence pairs
(STS-B test, where NMSPARSE_DATA has it) and word pairs that people have rated?

Rows that the output file already holds under the same recipe are kept, so the command goes on where
it was stopped; `--model` and `--only` measure some of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from baseline import say
from files import write_json
from oneshot import recipe, refined

from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.stage import evaluate
from nmsparse_deploy.recipe import Evaluate, Prune, fingerprint, validate
from nmsparse_deploy.system.environment import environment, now

ROWS: dict[str, dict[str, Any]] = {
    "magnitude": refined("magnitude"),
    "wanda": refined("wanda"),
    "sparsegpt": refined("sparsegpt"),
    "wanda + llm-barber": refined("wanda", "llm-barber"),
    "closed-form": recipe("closed-form"),
    "best": recipe("best"),
    "maskllm": recipe("maskllm"),
}
USUAL = tuple(name for name in ROWS if name not in ("best", "maskllm"))
"""Measured unless `--only` names others."""
CALIBRATION: dict[str, dict[str, Any]] = {
    "vit": {"data": "fashion-mnist+tiny-photos", "samples": 64, "batch": 16},
    "minilm": {"data": "wikipedia", "samples": 512, "length": 64, "batch": 32},
}
EVALUATION = {"vit": Evaluate(), "minilm": Evaluate()}


def spec_of(model: str, name: str, seed: int) -> Prune:
    return validate(Prune, {**ROWS[name], "calibration": {**CALIBRATION[model], "seed": seed}})


def measure(model: str, name: str, seed: int, runs: Path) -> dict[str, Any]:
    """Prune and evaluate; every metric of the pruned model, and of the dense one."""
    spec = spec_of(model, name, seed)
    run = prune(model, spec, runs / f"{model}-{name.replace(' ', '')}-{seed}", progress=say)
    found = evaluate(run, EVALUATION[model], say)["results"]
    values = {
        label: {
            row["metric"]: {key: row[key] for key in ("value", "standard_error", "samples")}
            for row in found[label]
        }
        for label in ("dense", "pruned")
    }
    record = run.manifest().stages["prune"]
    return {
        "model": model,
        "method": name,
        "seed": seed,
        "fingerprint": fingerprint(model, spec),
        "seconds": record.seconds,
        "peak_memory_mb": record.peak_memory_mb,
        **values,
    }


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of every metric of one model, with the spread between seeds."""
    lines = [
        {
            "method": "dense",
            "seeds": 0,
            "seconds": 0.0,
            **{
                metric: {"mean": row["value"], "seed_spread": None}
                for metric, row in rows[0]["dense"].items()
            },
        }
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {
            "method": name,
            "seeds": len(mine),
            "seconds": statistics.median(row["seconds"] for row in mine),
        }
        for metric in mine[0]["pruned"]:
            values = [row["pruned"][metric]["value"] for row in mine]
            line[metric] = {
                "mean": statistics.fmean(values),
                "seed_spread": statistics.stdev(values) if len(values) > 1 else None,
            }
        lines.append(line)
    return lines


def write(rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    found = {model: [row for row in rows if row["model"] == model] for model in CALIBRATION}
    result = {
        "command": f"python benchmarks/real.py --out results/{out.name}",
        "date": now(),
        "pattern": "2:4",
        "calibration": CALIBRATION,
        **environment(),
        "tables": {model: table(mine) for model, mine in found.items() if mine},
        "rows": rows,
    }
    write_json(out, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", action="append", choices=list(CALIBRATION), default=[])
    parser.add_argument("--only", action="append", choices=list(ROWS), default=[])
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    have = {(row["model"], row["method"], row["seed"]): row for row in kept}
    models, names = list(CALIBRATION), list(ROWS)

    def place(key: tuple[str, str, int]) -> tuple[int, int, int]:
        return models.index(key[0]), names.index(key[1]), key[2]

    result: dict[str, Any] = {"tables": {}}
    for model, name, seed in product(models, names, range(options.seeds)):
        wanted = model in (options.model or CALIBRATION) and name in (options.only or USUAL)
        spec = spec_of(model, name, seed)
        if not wanted or (seed and not spec.learn and spec.needs == "none"):
            continue  # nothing of it depends on the sample
        if have.get((model, name, seed), {}).get("fingerprint") != fingerprint(model, spec):
            have[model, name, seed] = measure(model, name, seed, options.runs)
        result = write([have[key] for key in sorted(have, key=place)], options.out)
    for model, lines in result["tables"].items():
        for line in lines:
            print(
                model,
                line["method"],
                *(
                    f"{metric.partition('@')[0]} {line[metric]['mean']:.3f}"
                    for metric in line
                    if isinstance(line[metric], dict)
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
