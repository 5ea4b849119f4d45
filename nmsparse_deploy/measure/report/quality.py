"""What pruning cost: every metric that `evaluate.json` holds, whatever its name, with its
protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nmsparse_deploy.measure.evaluate.result import DrawnImage, EvalResult, Protocol, Ratio
from nmsparse_deploy.measure.report.stages import Circumstances, EvaluateFile
from nmsparse_deploy.runs.section import (
    Block,
    Bullets,
    Facts,
    Figure,
    Fold,
    Graphic,
    Paragraph,
    Section,
    Table,
    columns,
)
from nmsparse_deploy.runs.wording import MISSING, facts, interval, number, with_error, within

TITLE = "Accuracy, dense and pruned"
FIRST = ("dense", "pruned")
MEANING = {
    "ppl": "perplexity per token; lower is better",
    "top1": "share of samples whose class comes first; higher is better",
    "same_top1": "share of samples for which the dense model's first class comes first; higher is better",
    "top5": "share of samples whose class is among the first five; higher is better",
    "acc": "share of right answers; higher is better",
    "spearman": "rank correlation with human ratings; higher is better",
    "cosine": "cosine similarity with the dense model's features; 1 is the same",
    "kl": "divergence from the dense model's class probabilities, in nats; 0 is the same",
    "mse": "squared error of the prediction; lower is better",
    "shift": "squared distance from the dense model's output, over its squared norm; 0 is the same",
    "iou": "overlap with the dense model's saliency maps; 1 is the same",
}
"""What a metric is, by its name before the `@` or the last word of that."""


@dataclass(frozen=True)
class MeasuredValue:
    """One metric of one model."""

    label: str
    metric: str
    value: float
    standard_error: float | None
    samples: int
    where: str
    protocol: Protocol


@dataclass(frozen=True)
class PairedComparison:
    """The paired ratio or difference, as the evaluation computed it; no interval where there was
    one sample."""

    kind: Literal["ratio", "difference"]
    value: float
    low: float | None
    high: float | None

    def words(self) -> str:
        """Say it with its interval."""
        sign = "/" if self.kind == "ratio" else "−"
        text = f"pruned {sign} dense {within(self.value, self.low, self.high)}"
        if self.low is None or self.high is None:
            return f"{text}, interval {MISSING}"
        return f"{text}, 95 % interval {interval(self.low, self.high)}"


@dataclass(frozen=True)
class SharedProtocol:
    """A protocol with the models that it holds for."""

    labels: tuple[str, ...]
    facts: Protocol


@dataclass(frozen=True)
class Quality:
    """Everything that was measured."""

    rows: tuple[MeasuredValue, ...]
    comparison: PairedComparison | None
    protocols: tuple[SharedProtocol, ...]
    held_out: dict[str, int | None] | None
    environment: Circumstances


@dataclass(frozen=True)
class PromptRow:
    """A prompt with what each model wrote after it."""

    prompt: str
    texts: dict[str, str | None]


@dataclass(frozen=True)
class Continuations:
    """Prompts with the text of every model side by side."""

    labels: tuple[str, ...]
    rows: tuple[PromptRow, ...]


def quality(data: EvaluateFile | None) -> Quality | None:
    """Collect the rows of every model, the paired comparison, and the protocols; None when nothing
    was evaluated."""
    if data is None:
        return None
    rows = tuple(
        _row(label, result)
        for label in _ordered(data.results)
        for result in several(data.results[label])
    )
    return Quality(
        rows,
        _comparison(data, rows),
        _protocols(rows),
        data.held_out,
        Circumstances(data.versions, data.hardware),
    )


def _ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda label: (FIRST.index(label) if label in FIRST else 9, label))


def several(results: EvalResult | list[EvalResult]) -> list[EvalResult]:
    """Return a list of results, of which some evaluations have only one."""
    return results if isinstance(results, list) else [results]


def _row(label: str, result: EvalResult) -> MeasuredValue:
    error = result.standard_error if result.samples != 1 else None  # one sample has no spread
    return MeasuredValue(
        label, result.metric, result.value, error, result.samples, result.where, result.protocol
    )


def _comparison(data: EvaluateFile, rows: tuple[MeasuredValue, ...]) -> PairedComparison | None:
    paired = data.ratio or data.difference
    if paired is None:
        return None
    low, high = (None, None) if any(row.samples == 1 for row in rows) else (paired.low, paired.high)
    if isinstance(paired, Ratio):
        return PairedComparison("ratio", paired.ratio, low, high)
    return PairedComparison("difference", paired.difference, low, high)


def _protocols(rows: tuple[MeasuredValue, ...]) -> tuple[SharedProtocol, ...]:
    shared: list[SharedProtocol] = []
    for row in rows:
        conditions: Protocol = {"metric": row.metric, "samples": row.samples, **row.protocol}
        same = next(
            (number for number, entry in enumerate(shared) if entry.facts == conditions), None
        )
        if same is None:
            shared.append(SharedProtocol((row.label,), conditions))
        else:
            shared[same] = SharedProtocol((*shared[same].labels, row.label), conditions)
    return tuple(shared)


def continuations(data: EvaluateFile | None) -> Continuations | None:
    """Put the texts of every model side by side; None when none were written."""
    if data is None or not data.continuations:
        return None
    labels = tuple(_ordered(data.continuations))
    texts = {(label, row.prompt): row.text for label in labels for row in data.continuations[label]}
    prompts = dict.fromkeys(row.prompt for label in labels for row in data.continuations[label])
    return Continuations(
        labels,
        tuple(
            PromptRow(prompt, {label: texts.get((label, prompt)) for label in labels})
            for prompt in prompts
        ),
    )


def accuracy(quality: Quality | None) -> Section:
    """Write the section about accuracy."""
    if quality is None:
        return Section(
            TITLE, (Paragraph("Not evaluated. Accuracy was not measured in this run."),), "accuracy"
        )
    protocols: tuple[Block, ...] = tuple(
        Section(f"How it was measured ({', '.join(entry.labels)})", (Facts(facts(entry.facts)),))
        for entry in quality.protocols
    )
    if len(protocols) > 2:
        protocols = (Fold(f"{len(protocols)} protocols, one by one", protocols),)
    return Section(TITLE, (*results(quality), *protocols), "accuracy")


def results(quality: Quality) -> tuple[Block, ...]:
    """Write the values, what their metrics mean, and the paired comparison."""
    heads = columns("model", "value ± standard error", "metric", "samples", "ran on")
    rows = tuple(
        (
            row.label,
            with_error(row.value, row.standard_error),
            row.metric,
            number(row.samples),
            row.where,
        )
        for row in quality.rows
    )
    blocks: list[Block] = [Table(TITLE, heads, rows)]
    meanings = {row.metric: meaning for row in quality.rows if (meaning := _meaning(row.metric))}
    if meanings:
        blocks.append(Bullets(tuple(meanings.items())))
    blocks += [
        Paragraph(f"Standard error of {row.label}: {MISSING}.", "soft")
        for row in quality.rows
        if row.standard_error is None
    ]
    if quality.comparison is not None:
        covered = (
            ""
            if quality.comparison.low is None
            else (
                " The interval covers the choice of evaluation samples, not the choice of calibration data."
            )
        )
        blocks += [
            Paragraph(f"Paired {quality.comparison.kind}: {quality.comparison.words()}."),
            Paragraph(
                f"The comparison is paired: dense and pruned saw the same samples.{covered}", "soft"
            ),
        ]
    return tuple(blocks)


def _meaning(metric: str) -> str | None:
    name = metric.partition("@")[0].partition("-of")[0]
    return MEANING.get(name) or MEANING.get(name.rpartition("_")[2])


def written(texts: Continuations) -> Section:
    """Write the section with continuations."""
    rows = tuple(
        (row.prompt, *(MISSING if text is None else text.strip() for text in row.texts.values()))
        for row in texts.rows
    )
    return Section(
        "What the models write",
        (
            Paragraph("Greedy continuations of the same prompts, side by side.", "soft"),
            Table(
                "Continuations side by side",
                columns("prompt", *texts.labels, text=texts.labels),
                rows,
            ),
        ),
        "continuations",
    )


def drawn(images: list[DrawnImage]) -> Section:
    """Write the section with images."""
    return Section(
        "What the models see",
        (
            Paragraph("The same images through the dense and the pruned model.", "soft"),
            Figure(tuple(Graphic(image.png_base64, image.title, "png") for image in images)),
        ),
        "images",
    )
