"""Every one-shot method and recipe on the demo model.

`python benchmarks/oneshot.py --out results/oneshot-smollm2-135m.json` keeps to the frozen protocol
of `baseline.py`, whose dense and SparseGPT rows are the two ends of the scale: the share of the gap
closed is (ln SparseGPT - ln x) / (ln SparseGPT - ln dense). One seed for everything, three for the
recipes in `THREE`.

A row is measured once: rows that the output file already holds under the same recipe are kept, so
the command goes on where it was stopped, on any machine. `--only NAME` measures some rows,
`--develop NAME` scores one on the text that settings are chosen on and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from baseline import CONTEXT, TOKENS, measure, say, score
from files import write_json
from gap import gap_closed, gap_ends

from nmsparse_deploy import models
from nmsparse_deploy.data.text import TokenSample, evaluation_sample, load_text
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.recipe import Prune, Recipe, fingerprint, validate
from nmsparse_deploy.system.environment import environment, now

ROOT = Path(__file__).parent.parent
BASELINE = ROOT / "results/baseline-smollm2-135m.json"


def recipe(name: str) -> dict[str, Any]:
    """The prune section of a recipe of this repository."""
    return Recipe.load(ROOT / f"recipes/{name}.yaml").prune.model_dump(mode="json")


def refined(method: str, *steps: str | dict[str, Any]) -> dict[str, Any]:
    return {
        "method": method,
        "refine": [{"name": step} if isinstance(step, str) else step for step in steps],
    }


ROWS: dict[str, dict[str, Any]] = {
    "closed-form": recipe("closed-form"),
    "best": recipe("best"),
    "group-obs": refined("group-obs"),
    "group-obs-ordered": refined("group-obs-ordered"),
    "group-obs + refit": refined("group-obs", "refit"),
    "wanda + refit": refined("wanda", "refit"),
    "alps": refined("alps"),
    "alps, closed-form": {**recipe("closed-form"), "method": "alps"},
    "isc": refined("isc"),
    "admm": refined("wanda", "admm"),
    "wanda + group-descent": refined("wanda", "group-descent"),
    "wanda + llm-barber": refined("wanda", "llm-barber"),
    "wanda + dsnot": refined("wanda", "dsnot"),
    "ria": refined("ria"),
    "permute, wanda": {**refined("wanda"), "permute": True},
    "permute, closed-form": {**recipe("closed-form"), "permute": True},
    "closed-form, generated text": {**recipe("closed-form"), "calibration": {"data": "generated"}},
    "wanda + swap": refined("wanda", "swap"),
    "isc-released": refined("isc-released"),
    "magnitude-2d": refined("magnitude-2d"),
    "sparsegpt, 4 bits": {**refined("sparsegpt"), "wbits": 4},
    "isc, 4 bits": {**refined("isc"), "wbits": 4},
    "wanda + llm-barber, 4 bits": {**refined("wanda", "llm-barber"), "wbits": 4},
    "sparsegpt, unstructured": {**refined("sparsegpt"), "pattern": "unstructured:0.5"},
    "isc, unstructured": {**refined("isc"), "pattern": "unstructured:0.5"},
    "wanda + llm-barber, unstructured": {
        **refined("wanda", "llm-barber"),
        "pattern": "unstructured:0.5",
    },
}
THREE = (
    "closed-form",
    "best",
    "permute, closed-form",
    "alps, closed-form",
    "group-obs + refit",
    "alps",
)
"""The best with the first seed: measured with three seeds of the calibration sample."""


def row(name: str, seed: int, samples: dict[str, TokenSample], runs: Path) -> dict[str, Any]:
    """One recipe and seed; the record names the recipe by its fingerprint."""
    spec = spec_of(name, seed)
    arguments = (name.replace(" ", ""), spec.model_dump(mode="json"), seed, samples, runs)
    with ProcessPoolExecutor(
        1, get_context("spawn")
    ) as pool:  # a process of its own, so that peak memory is its own
        found = pool.submit(measure, *arguments).result()
    return {**found, "method": name, "fingerprint": fingerprint("demo", spec)}


def spec_of(name: str, seed: int) -> Prune:
    section = {"calibration": {}, **ROWS[name]}
    return validate(
        Prune,
        {**section, "calibration": {"data": "wikipedia", **section["calibration"], "seed": seed}},
    )


def table(rows: list[dict[str, Any]], ends: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Geometric mean over seeds, spread between seeds, and the share of the gap closed on every
    text."""
    lines = []
    for name in dict.fromkeys(found["method"] for found in rows):
        mine = [found for found in rows if found["method"] == name]
        line: dict[str, Any] = {
            "method": name,
            "seeds": len(mine),
            "peak_memory_mb": mine[0]["peak_memory_mb"],
            "seconds": statistics.median(found["seconds"] for found in mine),
        }
        for text, end in ends.items():
            logs = [math.log(found["scores"][text]["value"]) for found in mine]
            log = statistics.fmean(logs)
            line[text] = {
                "ppl": math.exp(log),
                "seed_spread": statistics.stdev(logs) if len(logs) > 1 else None,
                "gap_closed": gap_closed(log, end),
            }
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/oneshot-smollm2-135m.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/oneshot"))
    parser.add_argument("--only", action="append", choices=list(ROWS), default=[])
    parser.add_argument(
        "--seeds", type=int, default=3, help="at most this many for the rows of THREE"
    )
    parser.add_argument("--develop", choices=list(ROWS))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    tokenizer = models.load("demo").processor
    if options.develop:
        develop(options.develop, tokenizer, options.runs)
        return
    baseline = json.loads(BASELINE.read_text())
    texts = baseline["protocol"]["texts"]
    samples = {
        text: evaluation_sample(load_text(text), tokenizer, TOKENS, CONTEXT) for text in texts
    }
    ends = gap_ends(baseline)
    kept = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    have = {(found["method"], found["seed"]): found for found in kept}
    for seed in range(options.seeds):
        for name in ROWS:
            if (seed and name not in THREE) or (options.only and name not in options.only):
                continue
            known = have.get((name, seed), {}).get("fingerprint")
            if known != fingerprint("demo", spec_of(name, seed)):
                have[name, seed] = row(name, seed, samples, options.runs)
            rows = [
                have[key]
                for key in sorted(have, key=lambda key: (list(ROWS).index(key[0]), key[1]))
            ]
            write(options.out, rows, table(rows, ends), baseline, ends)
    for line in table(list(have.values()), ends):
        print(
            line["method"],
            *(f"{t} {line[t]['ppl']:.2f} ({line[t]['gap_closed']:.2f})" for t in texts),
            flush=True,
        )


def write(
    out: Path,
    rows: list[dict[str, Any]],
    lines: list[dict[str, Any]],
    baseline: dict[str, Any],
    ends: dict[str, Any],
) -> None:
    result = {
        "command": f"python benchmarks/oneshot.py --out results/{out.name}",
        "date": now(),
        "model": "demo",
        "protocol": baseline["protocol"],
        "ends": ends,
        **environment(),
        "table": lines,
        "rows": rows,
    }
    write_json(out, result)


def develop(name: str, tokenizer: Any, runs: Path) -> None:
    """Seed 0 on WikiText-2 valid, for choosing settings."""
    sample = {
        "wikitext2-valid": evaluation_sample(
            load_text("wikitext2-valid"), tokenizer, TOKENS // 2, CONTEXT
        )
    }
    run = prune("demo", spec_of(name, 0), runs / f"{name.replace(' ', '')}-0", progress=say)
    print(name, score(str(run / "model"), sample, name)["wikitext2-valid"]["value"])


if __name__ == "__main__":
    main()
