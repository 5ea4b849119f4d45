"""Trace, save, tidy, link: one call from a module to an ONNX file that is known to hold its
weights."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmsparse_deploy.errors import (
    MissingExtra,
    NmsparseError,
    UsageError,
    first_line,
    from_os_error,
)
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.ship.onnx.experts import unroll_experts
from nmsparse_deploy.ship.onnx.link import LinkMap, link
from nmsparse_deploy.ship.onnx.prepare import (
    PRECISIONS,
    cast_copy,
    dynamic_shapes,
    take_one_output,
    trace_inputs,
)
from nmsparse_deploy.ship.onnx.tidy import TensorSpec, dynamic_dims, fixed_axes, tensor_specs, tidy
from nmsparse_deploy.ship.onnx.translate import translations
from nmsparse_deploy.system.progress import Progress, silent

if TYPE_CHECKING:
    import onnx

STEPS = 4
OPSETS = range(18, 24)
"""What the dynamo exporter of torch 2.11 to 2.13 writes. From 23 on, attention and RMSNorm are
single nodes."""


@dataclass(frozen=True)
class TracedGraph:
    """A written graph. `files` maps file name to bytes."""

    name: str
    files: dict[str, int]
    precision: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dynamic: tuple[str, ...]
    """Names of the axes that may vary."""
    dense_bytes: int
    """What the weights of the unpruned model take at this precision."""
    seconds: float
    warnings: tuple[str, ...]

    @property
    def size_note(self) -> str:
        """Say that ONNX stores every zero: no claim about a smaller file can be made."""
        return (
            f"The ONNX files take {sum(self.files.values()) / 1e6:.1f} MB, the dense weights "
            f"{self.dense_bytes / 1e6:.1f} MB: ONNX stores the zeros, so pruning saves nothing here."
        )


@dataclass(frozen=True)
class ExportResult(TracedGraph):
    """A written graph, and where every target is in it."""

    link: LinkMap

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "link": self.link.as_dict(), "size_note": self.size_note}


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    folder: Path,
    name: str,
    targets: Sequence[Target],
    *,
    precision: str = "fp32",
    opset: int = 20,
    dynamic: bool = True,
    output: str | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Write `NAME.onnx`, `NAME.onnx.data` and `NAME.link.json` into `folder`.

    `inputs` are the keyword arguments of one forward pass; `output` is the field of the result to
    keep (by default the logits, else the last hidden state). The caller's module is left as it is.
    With `dynamic`, the batch and, for inputs of two axes, the sequence may vary. Either all three
    files appear or none.

    Raises `NmsparseError` when the model cannot be traced, `CheckFailed` when a target's values are
    not in the graph.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"'{precision}' is not a precision; choose one of {', '.join(PRECISIONS)}."
        )
    if opset not in OPSETS:
        raise UsageError(
            f"Opset {opset} cannot be exported; choose one from {OPSETS[0]} to {OPSETS[-1]}."
        )
    if Path(name).name != name:
        raise UsageError(f"'{name}' is not a file name.")
    _require("onnx", "onnxscript")
    start = time.perf_counter()
    dtype = PRECISIONS[precision]
    progress(f"exporting ONNX {precision}: casting", 0, STEPS)
    copied, notes = cast_copy(module, dtype)
    notes += unroll_experts(copied)
    sample = trace_inputs(inputs, dtype, dynamic)
    taken = take_one_output(copied, list(sample), output)
    shapes = dynamic_shapes(sample) if dynamic else None
    model, linked, files = write_graph(
        copied,
        sample,
        shapes,
        taken,
        folder,
        name,
        targets,
        opset,
        lambda what, step: progress(f"exporting ONNX {precision}: {what}", step, STEPS),
    )
    progress(f"exported ONNX {precision}", 4, STEPS)
    given, made = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
    if dynamic:
        notes += fixed_axes(given, dict(zip(sample, dynamic_shapes(sample))))
    return ExportResult(
        name,
        files,
        precision,
        opset,
        given,
        made,
        dynamic_dims(given, made),
        _dense_bytes(copied),
        time.perf_counter() - start,
        tuple(notes),
        linked,
    )


def write_graph(
    module: nn.Module,
    sample: Mapping[str, torch.Tensor],
    shapes: tuple[Any, ...] | None,
    outputs: Sequence[str],
    folder: Path,
    name: str,
    targets: Sequence[Target],
    opset: int,
    progress: Callable[[str, int], None],
) -> tuple[onnx.ModelProto, LinkMap, dict[str, int]]:
    """Trace a prepared module and write its three files; returns the graph without weights, the
    link map and the sizes.

    `outputs` may be filled while the module is traced.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            path = Path(scratch) / f"{name}.onnx"
            progress("tracing", 1)
            program = _trace(module, sample, opset, shapes)
            progress("writing weights", 2)
            for value, wanted in zip(program.model.graph.outputs, outputs):
                value.name = wanted
            program.save(path, external_data=True)
            del program
            model = tidy(path)
            progress("proving where each weight went", 3)
            linked = link(path, module, targets)
            linked.save(path.with_suffix(".link.json"))
            return model, linked, _publish(Path(scratch), folder)
    except OSError as error:
        raise from_os_error(error) from error


def _trace(
    module: nn.Module,
    sample: Mapping[str, torch.Tensor],
    opset: int,
    shapes: tuple[Any, ...] | None,
) -> Any:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(sample.values()),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(sample),
                dynamic_shapes=(shapes,) if shapes else None,
                optimize=not _has_batch_norm(module),
                custom_translation_table=translations(),
            )
    except NmsparseError:
        raise
    except Exception as error:
        cause = _root(error)
        if isinstance(cause, NmsparseError):
            raise cause from error
        hint = "try dynamic=False, which exports the exact shapes of the sample" if shapes else None
        raise NmsparseError(
            f"The model could not be exported to ONNX: {type(cause).__name__}: {first_line(cause)}.",
            hint,
        ) from error
    return program


def _has_batch_norm(module: nn.Module) -> bool:
    """Tell whether there is a batch norm, which the exporter's optimizer would fold into the
    convolution before it."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


def _publish(scratch: Path, folder: Path) -> dict[str, int]:
    """Move the files to their place, the graph last: whoever sees it finds its weights."""
    files = sorted(scratch.iterdir(), key=lambda p: p.suffix == ".onnx")
    sizes = {file.name: file.stat().st_size for file in files}
    for file in files:
        os.replace(file, folder / file.name)
    return sizes


def _dense_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "onnx", "The export to ONNX") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which logs and warns about packages that nobody asked for; real
    failures are exceptions."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield  # torch prints the whole graph of what it cannot trace
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
