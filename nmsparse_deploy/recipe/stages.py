"""The sections of a recipe for the stages around pruning: plan, export, build, pack, evaluate,
bench."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.pattern import Unstructured, parse_pattern
from nmsparse_deploy.recipe.calibration import AUTO, Calibration
from nmsparse_deploy.recipe.section import Frozen
from nmsparse_deploy.registry import ENGINES, METHODS


class Allocate(Frozen):
    """The choice of the fusion groups that get the pattern, under exactly one constraint:
    `max_ppl_increase` (relative), `min_speedup` (of the whole model), or `budget` (share of the
    prunable weights). An unstructured pattern takes none: every matrix gets a share of zeros of its
    own around the pattern's."""

    max_ppl_increase: float | None = Field(
        None,
        gt=0,
        description="win the most time within this relative rise of perplexity, for example 0.10",
    )
    min_speedup: float | None = Field(
        None, gt=1, description="lose the least for a model this much faster"
    )
    budget: float | None = Field(
        None,
        gt=0,
        le=1,
        description="lose the least with this share of the prunable weights pruned",
    )
    pattern: str = Field(
        "2:4",
        description="keep:group, or unstructured:SHARE_OF_ZEROS, the mean of what every matrix "
        "gets",
    )
    spread: float = Field(
        0.1, gt=0, lt=1, description="how far unstructured shares of zeros lie from their mean"
    )
    vary_keep: bool = Field(
        False, description="choose among keep-1, keep and keep+1, never dense; needs budget"
    )
    estimator: Literal["direct", "hutchinson"] = Field(
        "direct", description="direct tries every group, hutchinson predicts from curvature"
    )
    method: str = Field("wanda", description="how a group is pruned for the trial")
    probes: int = Field(8, ge=1, description="random vectors of the Hutchinson estimator")
    calibration: Calibration = Calibration(samples=16, length=256)
    latency_table: str | None = Field(
        None, description="JSON file of measured GEMM times, as `crossover` writes it"
    )
    gpu: str = Field("A100", description="whose roofline predicts where nothing was measured")
    rows: int | None = Field(
        None, ge=1, description="batch times tokens of a GEMM; left out: the table's, or 2048"
    )
    include: tuple[str, ...] = Field(
        (), description="globs on parameter names to prune; none: everything prunable"
    )
    exclude: tuple[str, ...] = Field((), description="globs on parameter names to leave dense")
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
        constraints = sum(
            value is not None for value in (self.max_ppl_increase, self.min_speedup, self.budget)
        )
        if isinstance(parse_pattern(self.pattern), Unstructured):
            if constraints or self.vary_keep:
                raise UsageError(
                    f"The mean of {self.pattern} is the constraint; leave the others out."
                )
            return self
        if constraints != 1:
            raise UsageError(
                "A plan takes exactly one of --max-ppl-increase, --min-speedup and --budget."
            )
        if self.vary_keep and self.budget is None:
            raise UsageError(
                "--vary-keep takes its mean density from --budget; no kernel runs what it makes faster."
            )
        if self.max_ppl_increase is not None and self.estimator != "direct":
            raise UsageError(
                "--max-ppl-increase needs the direct estimator; curvature predicts no perplexity."
            )
        return self


class Export(Frozen):
    """The ONNX files that are written."""

    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "fp8"], ...] = Field(
        ("fp32", "fp16"), description="precision of the weights, one graph for each"
    )
    opset: Literal[20, 23] = Field(20, description="ONNX operator set")
    cache: bool = Field(
        False,
        description="language models: also a prefill and a decode graph with a key/value "
        "cache, on the same weights",
    )
    scales: Literal["channel", "tensor"] = Field(
        "channel",
        description="int8 and fp8: weight scales per output, or "
        "one for all weights that read the same input",
    )
    requantise: bool = Field(
        True, description="int8 and fp8: 8-bit outputs of the GEMMs that are sparse"
    )


EngineName = Annotated[str, AfterValidator(ENGINES.check)]
Options = dict[str, str | int | float | bool | None]


class Build(Frozen):
    """The engines that are built from one exported graph."""

    engine: EngineName = Field("tensorrt", description="runtime, see `nmsparse-deploy list`")
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = Field(
        "fp16", description="which exported graph"
    )
    batch: int = Field(1, ge=1, description="samples per call")
    length: int = Field(128, ge=1, description="tokens per sample")
    shapes: dict[str, tuple[int, ...]] = Field(
        {}, description="shapes of inputs that batch and length do not settle"
    )
    level: int = Field(
        4, ge=4, le=5, description="builder optimisation level; below 4 not every kernel is tried"
    )
    timing_iterations: int = Field(
        8, ge=8, description="timings that are averaged for every tactic"
    )
    route: str | None = Field(
        None, description="build-route knobs for a third engine, where TensorRT lists them"
    )
    allow_fp32: bool = Field(False, description="build although no weight is in low precision")
    options: Options = Field(
        {}, description="other settings of the runtime; a wrong one is answered with those it has"
    )


class Pack(Frozen):
    """The PyTorch models without stored zeros that are written from a run, and at which sizes their
    GEMMs are timed."""

    precisions: tuple[Literal["fp16", "bf16", "int8", "fp8"], ...] = Field(("fp16",), min_length=1)
    rows: tuple[int, ...] = Field(
        (128, 4096), min_length=1, description="batch times tokens of a GEMM"
    )
    rounds: int = Field(21, ge=5, description="timings of every GEMM")


class Evaluate(Frozen):
    """The held-out data that the dense and the pruned model are compared on.

    Tokens, context and continuation are for language models; images, probe, size and photos for
    vision models; images, drawn, steps, guidance and features for diffusion models.
    """

    data: str = Field(AUTO, description="held-out text or images; auto suits the model")
    tokens: int = Field(16384, ge=1, description="tokens to score (language models)")
    context: int = Field(1024, ge=8, description="tokens per window (language models)")
    continuation: int = Field(40, ge=0, description="tokens of the sample texts; 0 leaves them out")
    images: int = Field(600, ge=1, description="labelled test images (vision models)")
    probe: int = Field(1500, ge=1, description="labelled images that the probes learn from")
    size: int = Field(
        0, ge=0, description="pixels per side of the labelled images; 0: the model's own"
    )
    photos: str = Field(
        "photos-20", description="images for agreement and saliency maps; empty: none"
    )
    drawn: int = Field(
        20, ge=0, description="samples drawn from the same noise (diffusion models); 0: none"
    )
    steps: int = Field(50, ge=1, description="denoising steps of a drawn sample")
    guidance: float = Field(
        4.0, ge=0, description="classifier-free guidance of drawn samples; 1: none"
    )
    features: str = Field(
        "", description="vision model whose features compare drawn with real images; empty: none"
    )
    onnx: bool = Field(False, description="also score the exported graphs")
    protocols: tuple[Literal["wikitext2", "ptb", "c4", "imagenet"], ...] = Field(
        (),
        description="instead: the papers' own test sets and settings; data is then a file or folder of them, auto: "
        "the hub",
    )
    tasks: tuple[str, ...] = Field(
        (), description="instead: zero-shot tasks of lm-evaluation-harness, or YAML files"
    )
    paper_context: int = Field(
        2048, ge=8, description="tokens per window of the protocols; some papers use 4096"
    )
    limit: int | None = Field(
        None, ge=1, description="only so many windows, images or documents, to try it out"
    )


class Bench(Frozen):
    """Shape and length of the latency arms."""

    batch: int = Field(1, ge=1, description="samples per call")
    length: int = Field(128, ge=1, description="tokens per sample")
    rounds: int = Field(10, ge=3, description="timed calls per arm")
    engine: EngineName = Field("onnxruntime", description="runtime that is timed beside PyTorch")


class Published(Frozen):
    """A figure of a paper or of a repository, shown beside what the recipe measures
    (docs/published.md)."""

    metric: str = Field(
        description="name of a metric of `evaluate`, for example wikitext2_ppl@2048"
    )
    value: float
    spread: float | None = Field(
        None, description="standard deviation over seeds, where the source gives one"
    )
    dense: float | None = Field(None, description="of the dense model, in the same source")
    source: str
