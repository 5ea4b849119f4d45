"""The one-shot baseline on the demo model:
`python benchmarks/baseline.py --out results/baseline-smollm2-135m.json`.

Protocol: 2:4 on every block GEMM, 64 x 512 calibration tokens of the Wikipedia sample, bf16
forwards, fp32 statistics; token perplexity over 32 windows of 1024 tokens of BBC news and of
WikiText-2 test (detokenised; needs NMSPARSE_DATA, left out without it); the same windows for every
row; three seeds of the calibration sample where the method uses data. Finished runs and scores are
kept, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from files import write_json
from safetensors.torch import load_file

from nmsparse_deploy import models
from nmsparse_deploy.data.text import TokenSample, check_disjoint, evaluation_sample, load_text
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.evaluate.perplexity import perplexity
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.registry import METHODS
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.hardware import compute_dtype

TOKENS, CONTEXT = 32768, 1024
ROWS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt-static": {"method": "sparsegpt-static"},
    "sparsegpt-mask": {"method": "sparsegpt-mask"},
}
"""Name in the table -> the prune section of its recipe."""


def held_out() -> dict[str, TokenSample]:
    """The texts that every row is scored on."""
    tokenizer = models.load("demo").processor
    texts = ["bbc", *(["wikitext2"] if os.environ.get("NMSPARSE_DATA") else [])]
    return {name: evaluation_sample(load_text(name), tokenizer, TOKENS, CONTEXT) for name in texts}


def score(source: str, samples: dict[str, TokenSample], label: str) -> dict[str, Any]:
    loaded = models.load(source)
    loaded.module.to(compute_dtype("auto", torch.device("cpu")))
    return {
        name: perplexity(loaded.module, sample, "cpu", f"{label} {name}", say).to_json()
        for name, sample in samples.items()
    }


def say(text: str, done: int = 0, total: int = 0) -> None:
    if done == total:
        print(text, flush=True)


def measure(
    name: str, method: dict[str, Any], seed: int, samples: dict[str, TokenSample], runs: Path
) -> dict[str, Any]:
    """One method and seed: prune and score, unless an earlier call did; check that the texts are
    held out."""
    run = RunDir(runs / f"{name}-{seed}")
    if not (run / "scores.json").is_file():
        calibration = {"data": "wikipedia", **method.get("calibration", {}), "seed": seed}
        spec = validate(Prune, {**method, "calibration": calibration})
        prune("demo", spec, run.path, progress=say)
        run.write_json("scores.json", score(str(run / "model"), samples, run.path.name))
    if (run / "calibration.safetensors").is_file():
        for sample in samples.values():
            check_disjoint(load_file(run / "calibration.safetensors")["ids"], sample.ids)
    manifest = run.manifest()
    record = manifest.stages["prune"]
    return {
        "method": name,
        "seed": seed,
        "seconds": record.seconds,
        "peak_memory_mb": record.peak_memory_mb,
        "recipe": manifest.recipe.to_json(),
        "scores": run.read_json("scores.json"),
    }


def table(rows: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """Geometric mean over seeds of every method, with the spread between seeds."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {
            "method": method,
            "seeds": len(mine),
            "seconds": statistics.median(row["seconds"] for row in mine),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in mine),
        }
        for text in texts:
            logs = [math.log(row["scores"][text]["value"]) for row in mine]
            line[text] = {
                "ppl": math.exp(statistics.fmean(logs)),
                "seed_spread": statistics.stdev(logs) if len(logs) > 1 else None,
            }
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/baseline"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--collect", action="store_true", help="only what is finished already; prune nothing"
    )
    options = parser.parse_args()
    samples = held_out()
    texts = list(samples)
    options.runs.mkdir(parents=True, exist_ok=True)
    kept = options.runs / "dense.json"
    if not kept.is_file():
        kept.write_text(json.dumps(score("demo", samples, "dense")))
    rows = [
        {
            "method": "dense",
            "seed": 0,
            "seconds": 0,
            "peak_memory_mb": 0,
            "scores": json.loads(kept.read_text()),
        }
    ]
    for seed in range(options.seeds):
        for name, method in ROWS.items():
            deterministic = METHODS[method["method"]].needs == "none"
            finished = (options.runs / f"{name}-{seed}" / "scores.json").is_file()
            if (finished or not options.collect) and not (seed and deterministic):
                rows.append(measure(name, method, seed, samples, options.runs))
    result = {
        "command": f"python benchmarks/baseline.py --out results/{options.out.name}",
        "date": now(),
        "model": "demo",
        "pattern": "2:4",
        "protocol": {"tokens": TOKENS, "context": CONTEXT, "texts": texts},
        **environment(),
        "table": table(rows, texts),
        "rows": rows,
    }
    write_json(options.out, result)
    for line in result["table"]:
        print(line["method"], *(f"{text} {line[text]['ppl']:.2f}" for text in texts), flush=True)


if __name__ == "__main__":
    main()
