"""A run folder with two blocks of two layers, every stage written by the types that write it in production."""

from __future__ import annotations

import json
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import torch

from nmsparse_deploy.bench import CPU_SENTENCE, BenchResult, ratio, summarise
from nmsparse_deploy.evaluate import EvalResult, paired_ratio
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.models.base import Skipped, Target
from nmsparse_deploy.pattern import NMPattern, project
from nmsparse_deploy.plan import Plan, PlanRow
from nmsparse_deploy.recipe import Prune, fingerprint
from nmsparse_deploy.rundir import RunDir
from nmsparse_deploy.verify.types import TensorCheck, VerifyReport

STAGES = ("verify", "evaluate", "export", "bench")
VOID = {"meta", "br", "link", "img", "input", "hr"}
PATTERN = NMPattern(2, 4)
NAMES = [f"blocks.{block}.{kind}.weight" for block in (0, 1) for kind in ("up", "down")]


def targets(names=NAMES):
    return [Target(name, name.removesuffix(".weight"), number // 2, 1, 64, 32, name) for number, name in
            enumerate(names)]


def make_run(folder: Path, stages=STAGES, *, model="pico", method="sparsegpt", names=NAMES, skipped="embedding table",
             errors=True) -> RunDir:
    spec = Prune(method=method, calibration={"samples": 2, "length": 16})
    run = RunDir.create(folder, {"model": model, **spec.model_dump(mode="json")}, fingerprint(model, spec), force=False)
    found = targets(names)
    plan = Plan(tuple(PlanRow(target, PATTERN, "selected") for target in found),
                (Skipped("embed.weight", (100, 64), skipped),), ("blocks.0", "blocks.1"))
    run.write_json("plan.json", plan.to_json())
    run.write_json("layers.json", [{"name": target.name, "block": target.block, "axis": 1, "pattern": "2:4",
                                    "shape": [32, 64], "dense_hash": "0", "seconds": 0.25,
                                    "relative_error": 0.0123 * (number + 1) if errors else None}
                                   for number, target in enumerate(found)])
    scores = torch.rand(32, 64, generator=torch.Generator().manual_seed(1))
    masks = {name: Mask.pack(project(scores.roll(number, 1), PATTERN), 1, PATTERN, "0") for number, name in
             enumerate(names)}
    MaskSet(masks, {"method": method}).save(run / "masks.safetensors")
    (run / "model").mkdir()
    (run / "model/model.safetensors").write_bytes(bytes(123_456))
    run.finish("prune", 12.5, layers=len(names), peak_memory_mb=321, provenance={"revision": "abc"},
               compute="float32", calibration={"source": "wikipedia", "fingerprint": "f00d", "samples": 2, "length": 16,
                                               "windows": [3, 7]} if errors else None)
    for stage in STAGES:
        if stage in stages:
            globals()[f"write_{stage}"](run)
    return run


def checks(run, place, names, bad=0):
    problems = ("3 of 512 groups break the pattern, the first at [0, 4]",) if bad else ()
    held = [TensorCheck(place, name, "F32", (32, 64), "2:4", 1, groups=512, bad=bad, mask_mismatch=0, negative_zeros=bad,
                        shape_verdict="recommended", problems=problems) for name in names]
    return VerifyReport(place, str(run / ("model" if place == "file" else "onnx/fp32/model.onnx")),
                        (*held, TensorCheck(place, "norm.weight", "F32", (64,), "", skipped="not in the mask set")),
                        bytes_read=4096, seconds=0.5)


def write_verify(run, bad=0, why="no TensorRT engine was built here"):
    names = [row["name"] for row in run.read_json("layers.json")]
    reports = [checks(run, "file", names, bad).to_json(), checks(run, "onnx", names).to_json()]
    run.write_json("verify.json", {"reports": reports, "not_checked": [{"place": "engine", "why": why}]})


def result(value, samples, metric="token_ppl@16"):
    protocol = {"data": "bbc", "context": 16, "stride": 16, "tokens": 64, "windows": [1, 2, 3, 4], "bos": False}
    return EvalResult(metric, value, 0.06125 * value, samples, "cpu", protocol,
                      tuple(3 + value / 100 + n / 10 for n in range(samples)))


def write_evaluate(run, dense=25.9512, pruned=116.1049, samples=4, texts=("Paris.\n\nYes.", " the the the")):
    results = {"pruned": result(pruned, samples), "dense": result(dense, samples)}
    drawn = torch.Generator().manual_seed(5)
    results["pruned"] = EvalResult(**{**results["pruned"].to_json(), "per_sample": tuple(
        (3.5 + torch.rand(samples, generator=drawn)).tolist())})
    continuations = {label: [{"prompt": "The capital of France is", "text": text}]
                     for label, text in zip(("dense", "pruned"), texts)}
    run.write_json("evaluate.json", {"results": {label: row.to_json() for label, row in results.items()},
                                     "ratio": paired_ratio(results["dense"], results["pruned"]),
                                     "continuations": continuations,
                                     "held_out": {"runs_compared": 49, "overlaps": 0}})
    run.finish("evaluate", 3.0, peak_memory_mb=400)


def write_export(run, agreement=None):
    same = {"kind": "logits", "positions": 48, "max_abs": 0.000123, "mean_abs": 1e-05, "relative": 2.5e-06,
            "argmax_share": 1.0, "mean_kl": 1e-9, "cosine": None}
    run.write_json("export.json", {"files": [
        {"name": "model", "files": {"model.onnx": 1234, "model.onnx.data": 765432}, "precision": "fp32", "opset": 20,
         "inputs": [], "outputs": [], "dynamic": ["batch"], "dense_bytes": 765000, "seconds": 4.0, "warnings": [],
         "size_note": "", "path": "onnx/fp32/model.onnx", "links": 4, "agreement": agreement or same}]})
    (run / "onnx/fp32").mkdir(parents=True, exist_ok=True)
    (run / "onnx/fp32/model.onnx").write_bytes(b"x")
    run.finish("export", 4.5)


def write_bench(run, names=("dense", "pruned", "pruned, ONNX fp32")):
    times = {name: [100.25 + 7 * place + n for n in range(10)] for place, name in enumerate(names)}
    arms = tuple(summarise(name, "ONNX Runtime CPU" if "ONNX" in name else "PyTorch CPU", times[name]) for name in names)
    ratios = {name: ratio(times["dense"], times[name]) for name in names if name != "dense"}
    bound = {"gpu": "A100", "rows": 128, "gemm_speedup": 1.625, "model_speedup": 1.375, "flop_share": 0.75,
             "formula": "a roofline"}
    known = {"where": "cpu", "shape": {"batch": 1, "length": 128}, "arms": arms, "ratios": ratios,
             "verdict": CPU_SENTENCE, "predicted": (bound,), "environment": {}}
    bench = BenchResult(**{field.name: known[field.name] for field in fields(BenchResult)})
    run.write_json("bench.json", {**bench.to_json(), "predicted": [bound]})
    run.finish("bench", 2.0)


class Page(HTMLParser):
    """Text, tags and attributes of a page; asserts that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def views(run: RunDir) -> tuple[str, str, dict]:
    """HTML, Markdown and JSON of a built report."""
    folder = run / "report"
    assert sorted(file.name for file in folder.iterdir()) == ["index.html", "report.json", "report.md"]
    strict = json.loads((folder / "report.json").read_text(), parse_constant=lambda name: 1 / 0)
    return (folder / "index.html").read_text(), (folder / "report.md").read_text(), strict
