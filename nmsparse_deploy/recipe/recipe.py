"""A recipe: everything that decides a result, validated before anything is loaded, frozen, and fingerprinted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.pattern import TWO_FOUR, Pattern, Unstructured, parse_pattern
from nmsparse_deploy.recipe.learn_settings import AnyLearn
from nmsparse_deploy.recipe.refine_steps import AnyStep, Finetune, Frozen, Refit
from nmsparse_deploy.registry import LEARNERS, METHODS, REFINEMENTS, check_method

DEFAULT_MODEL = "demo"
AUTO = "auto"
"""Data that suits the model's family: text, or pictures. What it came to is recorded with the run."""


class Calibration(Frozen):
    """Which data the statistics come from.

    `data` is a packaged set's name, a text file, a folder of texts or images, an archive of images, or `generated` for
    text that the model writes itself; `A+B` takes as many samples of each.
    """

    data: str = AUTO
    samples: int = Field(64, ge=0)
    length: int = Field(512, ge=8, description="tokens per sample (text only)")
    batch: int = Field(4, ge=1)
    seed: int = 0


class Prune(Frozen):
    """How the mask is found, and how the weights that stay are refined."""

    method: str = "sparsegpt"
    pattern: str = "2:4"
    permute: bool = Field(False, description="first reorder the channels that are free to move, for better groups")
    calibration: Calibration = Calibration()
    wbits: Literal[4, 8] | None = Field(None, description="round kept weights to this many bits")
    wgroup: int | None = Field(None, ge=1, description="columns that share a scale, with wbits; left out: a whole row")
    learn: AnyLearn | None = Field(None, description="settings of a learned method; filled in when there is one")
    refine: tuple[AnyStep, ...] = Field((), description="applied in order after the mask is chosen")
    sequential: bool = Field(False, description="a layer's statistics see the pruned layers before it in its block; "
                                                "about twice the forward passes")
    include: tuple[str, ...] = Field((), description="globs on parameter names; empty = everything prunable")
    exclude: tuple[str, ...] = ()
    patterns: dict[str, str] | None = Field(None, description="parameter name -> keep:group, dense, or dense: why; "
                                            "what is not named gets `pattern`")
    compute: Literal["auto", "fp32", "bf16"] = Field("auto", description="dtype of forward passes; statistics are fp32")

    @model_validator(mode="before")
    @classmethod
    def _section_of_the_method(cls, data: Any) -> Any:
        """`learn` need not repeat the method's name, and is there whenever the method learns."""
        if not isinstance(data, dict):
            return data
        method, section = data.get("method"), data.get("learn")
        if method not in LEARNERS.entries:
            if section is not None:
                name = method or cls.model_fields["method"].default
                raise UsageError(f"The section learn belongs to a learned method, and '{name}' is none.",
                                 f"one of: {', '.join(LEARNERS.names())}")
            return data
        if section is None or (isinstance(section, dict) and "name" not in section):
            return {**data, "learn": {"name": method, **(section or {})}}
        return data

    @property
    def finetune(self) -> Finetune | None:
        """The step that trains the whole model, if there is one."""
        return next((step for step in self.refine if isinstance(step, Finetune)), None)

    @property
    def walked(self) -> int:
        """Calibration samples that pass from block to block; what trains the whole model reads all of them."""
        samples = self.calibration.samples
        return min(self.finetune.prior_samples or samples, samples) if self.finetune else samples

    @property
    def rounds_last(self) -> bool:
        """Does `wbits` take a sweep of its own on the finished mask, because the method's own is not the last word?"""
        return self.wbits is not None and (bool(self.refine) or not METHODS.load(self.method).quantises)

    @field_validator("patterns")
    @classmethod
    def _valid_patterns(cls, named: dict[str, str] | None) -> dict[str, str] | None:
        for text in (named or {}).values():
            decided(text)
        return named

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name in REFINEMENTS.names():
            raise UsageError(f"'{name}' refines a mask; type --method wanda --refine {name}.")
        return check_method(name)

    @field_validator("refine", mode="before")
    @classmethod
    def _known_refinements(cls, steps: Any) -> Any:
        for step in steps if isinstance(steps, (list, tuple)) else ():
            if isinstance(step, dict):
                REFINEMENTS.check(str(step.get("name")))
        return steps

    @field_validator("pattern")
    @classmethod
    def _valid_pattern(cls, text: str) -> str:
        return str(parse_pattern(text))

    @model_validator(mode="after")
    def _finds_the_pattern(self) -> Prune:
        """What needs groups, or knows one pattern only, refuses others before anything is loaded."""
        named = [decided(text)[0] for text in (self.patterns or {}).values()]
        asked = [p for p in (parse_pattern(self.pattern), *named) if p is not None]
        other = next((p for p in asked if p != TWO_FOUR), None)  # 2:4 every method finds; it need not be loaded to ask
        if other is not None and self.method in METHODS.entries and (only := METHODS.load(self.method).only):
            raise UsageError(f"The method '{self.method}' finds {only} masks only, not {other}.")
        loose = next((p for p in asked if isinstance(p, Unstructured)), None)
        if loose is not None:
            able = [name for name in METHODS.names() if METHODS.load(name).scope]
            _refuse_others("method", [self.method], able, str(loose))
            found = {name: REFINEMENTS.load(name) for name in REFINEMENTS.names()}
            able = [name for name, step in found.items() if step.changes == "weights" or step.unstructured]
            _refuse_others("refinement", [step.name for step in self.refine], able, str(loose))
            if self.permute:
                raise UsageError(f"Permuting channels makes better groups, and {loose} has none.",
                                 "leave out --permute")
        return self

    @model_validator(mode="after")
    def _whole_model_last(self) -> Prune:
        """What trains the whole model comes after everything else, once."""
        if any(isinstance(step, Finetune) for step in self.refine[:-1]):
            raise UsageError("finetune trains the whole pruned model; it comes once, after all other refinements.")
        last = self.finetune
        if last is not None and last.batch is not None and last.batch % self.calibration.batch:
            raise UsageError(f"finetune's batch {last.batch} is not a multiple of calibration.batch "
                             f"{self.calibration.batch}, the samples that pass at a time.")
        if last is not None and last.moves_mask:
            named = [decided(text)[0] for text in (self.patterns or {}).values()]
            if any(isinstance(p, Unstructured) for p in (parse_pattern(self.pattern), *named)):
                raise UsageError(f"finetune with {last.how} chooses within groups, and the pattern has none.",
                                 "how: fixed")
            if self.permute:
                raise UsageError(f"finetune with {last.how} brings back dense weights, which permuting moves.",
                                 "how: fixed, or leave out --permute")
        return self

    @model_validator(mode="after")
    def _can_be_learned(self) -> Prune:
        if self.learn is None:
            return self
        if self.learn.name != self.method:
            raise UsageError(f"The section learn is that of '{self.learn.name}', the method is '{self.method}'.")
        if self.learn.batch is not None and self.learn.batch % self.calibration.batch:
            raise UsageError(f"learn.batch {self.learn.batch} is not a multiple of calibration.batch "
                             f"{self.calibration.batch}, the samples that pass at a time.")
        if self.permute and self.learn.objective == "global":
            raise UsageError("Permuted channels are learned a block at a time.", "--objective block")
        if self.permute and self.learn.prior_files:
            raise UsageError("A mask file does not fit channels in another order.", "leave out --permute")
        return self

    @model_validator(mode="after")
    def _can_be_rounded(self) -> Prune:
        if self.wbits is None:
            if self.wgroup is not None:
                raise UsageError(f"wgroup {self.wgroup} shares the scales of wbits, which is not set.", "--wbits 4")
            return self
        if self.learn is not None:
            raise UsageError(f"A mask that '{self.method}' learned is not rounded to {self.wbits} bits here.",
                             "leave out --wbits, and round at export with --precision int8 or fp8")
        if self.finetune:
            raise UsageError(f"'{self.finetune.name}' would move weights off the {self.wbits}-bit grid; leave out "
                             "--refine or --wbits.")
        unit = parse_pattern(self.pattern).stretch
        if self.wgroup is not None and self.wgroup % unit:
            raise UsageError(f"wgroup {self.wgroup} is not a multiple of {unit}, the columns pruned at a time.")
        return self



def _refuse_others(kind: str, asked: list[str], able: list[str], pattern: str) -> None:
    for name in asked:
        if name not in able:
            raise UsageError(f"The {kind} '{name}' works in N:M groups only; for {pattern} take {' or '.join(able)}.")


DENSE = "dense"


def decided(text: str) -> tuple[Pattern | None, str]:
    """A value of `Prune.patterns`: its pattern (None = dense), and why. Raises `UsageError`."""
    head, _, why = text.partition(":")
    return (None, why.strip()) if head.strip() == DENSE else (parse_pattern(text), "")


class Allocate(Frozen):
    """Which fusion groups get the pattern, under exactly one constraint: `max_ppl_increase` (relative), `min_speedup`
    (of the whole model), or `budget` (share of the prunable weights). An unstructured pattern takes none: every matrix
    gets a share of zeros of its own around the pattern's."""

    max_ppl_increase: float | None = Field(None, gt=0)
    min_speedup: float | None = Field(None, gt=1)
    budget: float | None = Field(None, gt=0, le=1)
    pattern: str = "2:4"
    spread: float = Field(0.1, gt=0, lt=1, description="how far unstructured shares of zeros lie from their mean")
    vary_keep: bool = Field(False, description="choose among keep-1, keep and keep+1 instead of pattern and dense")
    estimator: Literal["direct", "hutchinson"] = "direct"
    method: str = Field("wanda", description="how a group is pruned for the trial")
    probes: int = Field(8, ge=1, description="random vectors of the Hutchinson estimator")
    calibration: Calibration = Calibration(samples=16, length=256)
    latency_table: str | None = Field(None, description="JSON file of measured GEMM times, as `crossover` writes it")
    gpu: str = Field("A100", description="whose roofline predicts where nothing was measured")
    rows: int | None = Field(None, ge=1, description="batch times tokens of a GEMM; empty = the table's, or 2048")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    compute: Literal["auto", "fp32", "bf16"] = "auto"

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return METHODS.check(name)

    @field_validator("pattern")
    @classmethod
    def _valid_pattern(cls, text: str) -> str:
        return str(parse_pattern(text))

    @model_validator(mode="after")
    def _one_constraint(self) -> Allocate:
        constraints = sum(value is not None for value in (self.max_ppl_increase, self.min_speedup, self.budget))
        if isinstance(parse_pattern(self.pattern), Unstructured):
            if constraints or self.vary_keep:
                raise UsageError(f"The mean of {self.pattern} is the constraint; leave the others out.")
            return self
        if constraints != 1:
            raise UsageError("A plan takes exactly one of --max-ppl-increase, --min-speedup and --budget.")
        if self.vary_keep and self.budget is None:
            raise UsageError("--vary-keep takes its mean density from --budget; no kernel runs what it makes faster.")
        if self.max_ppl_increase is not None and self.estimator != "direct":
            raise UsageError("--max-ppl-increase needs the direct estimator; curvature predicts no perplexity.")
        return self


CLOSED_FORM = Prune(method="group-obs", refine=(Refit(),), sequential=True)
"""Recommended where nothing else is asked for: no back-propagation, minutes for a small model (docs/methods.md)."""


class Export(Frozen):
    """Which ONNX files are written."""

    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "fp8"], ...] = ("fp32", "fp16")
    opset: Literal[20, 23] = 20
    cache: bool = Field(False, description="language models: also a prefill and a decode graph with a key/value cache")
    scales: Literal["channel", "tensor"] = Field("channel", description="int8 and fp8: weight scales per output, or "
                                                 "one for all weights that read the same input")
    requantise: bool = Field(True, description="int8 and fp8: 8-bit outputs of the GEMMs that are sparse")


class Build(Frozen):
    """The TensorRT engines that are built from one exported graph."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = "fp16"
    batch: int = Field(1, ge=1)
    length: int = Field(128, ge=1, description="tokens per sample")
    shapes: dict[str, tuple[int, ...]] = Field({}, description="shapes of inputs that batch and length do not settle")
    level: int = Field(4, ge=4, le=5, description="builder optimisation level; below 4 not every kernel is tried")
    timing_iterations: int = Field(8, ge=8, description="timings that are averaged for every tactic")
    route: str | None = Field(None, description="build-route knobs for a third engine, where TensorRT lists them")
    allow_fp32: bool = Field(False, description="build although no weight is in low precision")


class Pack(Frozen):
    """The PyTorch models without stored zeros that are written from a run, and at which sizes their GEMMs are timed."""

    precisions: tuple[Literal["fp16", "bf16", "int8", "fp8"], ...] = Field(("fp16",), min_length=1)
    rows: tuple[int, ...] = Field((128, 4096), min_length=1, description="batch times tokens of a GEMM")
    rounds: int = Field(21, ge=5, description="timings of every GEMM")


class Evaluate(Frozen):
    """Which held-out data the dense and the pruned model are compared on.

    Tokens, context and continuation are for language models; images, probe, size and photos for vision models; images,
    drawn, steps, guidance and features for diffusion models.
    """

    data: str = AUTO
    tokens: int = Field(16384, ge=1)
    context: int = Field(1024, ge=8)
    continuation: int = Field(40, ge=0, description="tokens of the sample continuations; 0 leaves them out")
    images: int = Field(600, ge=1, description="labelled test images")
    probe: int = Field(1500, ge=1, description="labelled images that the probes learn from")
    size: int = Field(0, ge=0, description="pixels per side for the labelled images; 0 = the model's own")
    photos: str = Field("photos-20", description="images for agreement and saliency maps; empty = none")
    drawn: int = Field(20, ge=0, description="samples that are drawn from the same noise; 0 = none")
    steps: int = Field(50, ge=1, description="denoising steps of a drawn sample")
    guidance: float = Field(4.0, ge=0, description="classifier-free guidance of drawn samples; 1 = none")
    features: str = Field("", description="vision model whose features compare drawn with real pictures; empty = none")
    onnx: bool = Field(False, description="also run the exported graphs")
    protocols: tuple[Literal["wikitext2", "ptb", "c4", "imagenet"], ...] = Field(
        (), description="instead: the papers' own test sets and settings; data is then a file or folder of them, auto: "
        "the hub")
    tasks: tuple[str, ...] = Field((), description="instead: zero-shot tasks of lm-evaluation-harness, or YAML "
                                   "files")
    paper_context: int = Field(2048, ge=8, description="tokens per window of the protocols; some papers use 4096")
    limit: int | None = Field(None, ge=1, description="only so many windows, images or documents, to try it out")


class Bench(Frozen):
    """Shape and length of the latency arms."""

    batch: int = Field(1, ge=1)
    length: int = Field(128, ge=1)
    rounds: int = Field(10, ge=3)


class Published(Frozen):
    """A figure of a paper or of a repository, shown beside what the recipe measures (docs/published.md)."""

    metric: str = Field(description="name of a metric of `evaluate`, for example wikitext2_ppl@2048")
    value: float
    spread: float | None = Field(None, description="standard deviation over seeds, where the source gives one")
    dense: float | None = Field(None, description="of the dense model, in the same source")
    source: str


class Recipe(Frozen):
    """One model through every stage."""

    model: str = DEFAULT_MODEL
    prune: Prune = Prune()
    export: Export | None = Export()
    build: Build | None = None
    evaluate: Evaluate | None = Evaluate()
    bench: Bench | None = Bench()
    config: dict[str, Any] | None = Field(None, description="the model's config.json as far as it decides shapes; "
                                          "--dry-run prices from it, nothing else reads it")
    published: tuple[Published, ...] = Field((), description="what others measured with this model and method")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a YAML recipe. Raises `UsageError` naming the field that is wrong."""
        if not path.is_file():
            raise UsageError(f"There is no recipe '{path}'.")
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(data, dict):
            raise UsageError(f"'{path}' is not a recipe: expected a mapping at the top.")
        return validate(cls, data)


def validate(model: type[Any], data: dict[str, Any]) -> Any:
    """Build a recipe model from plain data; the first problem becomes one `UsageError` sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise UsageError(f"{field}: {first['msg']} (got {first['input']!r}).") from error


LATER = (("through", 0), ("shard", False), ("moments", 32), ("labels", False), ("augment", None),
         ("prior_samples", 0))
"""Settings of steps and of learning that came later than runs, with the values that ask for nothing new."""


def fingerprint(model: str, prune: Prune) -> str:
    """Identity of a prune stage: 16 hex digits over everything that can change its result.

    Fields that ask for nothing are left out, so that a new option does not make every older run another one.
    """
    asked = {name: value for name, value in prune.model_dump(mode="json").items() if value not in ([], None, False)}
    if prune.refine:
        asked["refine"] = [{name: value for name, value in step.items() if (name, value) not in LATER}
                           for step in asked["refine"]]
    if prune.learn:
        asked["learn"] = {name: value for name, value in asked["learn"].items() if (name, value) not in LATER}
    canonical = json.dumps({"model": model, **asked}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two recipes differ, with both values."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} ({a!r} there, {b!r} now)")
    return found
