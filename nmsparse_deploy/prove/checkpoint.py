"""Verify a checkpoint on disk, any size, in one streaming pass with constant memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, Pattern
from nmsparse_deploy.prove.compressed import bitmask_check, find_compressed
from nmsparse_deploy.prove.gguf_file import read_gguf
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES
from nmsparse_deploy.prove.layout import Config, Layout, Layouts, family, read_config, settle
from nmsparse_deploy.prove.report import TensorCheck, VerifyReport
from nmsparse_deploy.prove.rows import foreign_check, masked_check, not_followed, unmatched
from nmsparse_deploy.prove.scan import Scanner, countable
from nmsparse_deploy.prove.stored_views import StoredViews, labelled, stored_masks, stored_pieces
from nmsparse_deploy.prove.tensor_files import StoredTensor, find_tensors
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.sparse_cores import shape_verdict

WITHOUT_ZERO = ("F8_E8M0", "BOOL")
"""Types of scales and of switches, which no layer multiplies by as weights."""
NOTHING_CALLED = "Nothing is called"
GGUF = Config(linear=True, said="in a GGUF file")
"""llama.cpp turns a `Conv1D` around."""


def verify_checkpoint(
    path: str | Path,
    masks: MaskSet | None = None,
    pattern: NMPattern = TWO_FOUR,
    expect: Sequence[str] = (),
    progress: Progress = silent,
    stored: StoredViews = MappingProxyType({}),
) -> VerifyReport:
    """Verify a .safetensors file, a folder of them, or a .gguf file.

    With masks: every masked tensor is there, in the pattern of its mask, zero outside the mask,
    finite and free of minus zeros; the others make no claim. `stored` says which parts of which
    parameters the tensors are, where they are not the parameters themselves. Without: every weight
    is judged by its values (`report.judge`) along the axis that its layer reduces (`layout`). A
    tensor that is nearly in the pattern fails, and so does a checkpoint in which nothing is sparse. `expect` names
    tensors (glob patterns) that have to be sparse.
    Raises `UsageError` when a file is missing or damaged.
    """
    start, scanner, path = time.perf_counter(), Scanner(), Path(path)
    gguf = path.suffix.lower() == ".gguf"
    tensors = read_gguf(path) if gguf else find_tensors(path)
    names = [tensor.name for tensor in tensors]
    seen = _progress_over(tensors, path, progress)
    if masks is None:
        config = GGUF if gguf else read_config(path if path.is_dir() else path.parent)
        checks, others = _foreign(tensors, seen, config, pattern, expect, scanner)
        names += others
        problems = nothing_sparse(str(path), checks, pattern)
    else:
        masks = stored_masks(masks, stored)
        parameters = {
            label: view.parameter
            for name, pieces in stored.items()
            for label, view in labelled(name, pieces).items()
        }
        checks = [
            _with_mask(piece, masks, parameters, _named(expect, tensor.name), scanner)
            for tensor in seen
            for piece in stored_pieces(tensor, stored)
        ]
        problems = _missing(path, masks, [check.tensor for check in checks])
    problems += unmatched_globs(expect, names)
    return VerifyReport(
        "file",
        str(path),
        tuple(checks),
        tuple(problems),
        scanner.bytes_read,
        time.perf_counter() - start,
    )


def _progress_over(
    tensors: Sequence[StoredTensor], path: Path, progress: Progress
) -> Iterator[StoredTensor]:
    total, done = sum(tensor.source.nbytes for tensor in tensors), 0
    for tensor in tensors:
        progress(f"verifying {path}", done, total)
        yield tensor
        done += tensor.source.nbytes
    progress(f"verifying {path}", done, total)


def _foreign(
    tensors: Sequence[StoredTensor],
    seen: Iterable[StoredTensor],
    config: Config,
    pattern: NMPattern,
    expect: Sequence[str],
    scanner: Scanner,
) -> tuple[list[TensorCheck], list[str]]:
    """Judge what has no masks; return the rows, and the names of weights that several tensors
    store."""
    layouts = Layouts({tensor.name: tensor.shape for tensor in tensors}, config)
    stored = find_compressed(tensors)
    checks = settle(
        [
            _without_mask(
                tensor, layouts.of(tensor.name), pattern, _named(expect, tensor.name), scanner
            )
            for tensor in seen
            if tensor.name not in stored.owners
        ],
        layouts,
    )
    others = []
    for weight in stored.bitmasks:
        names = [weight.name, f"{weight.name}.weight"]
        checks.append(bitmask_check(weight, pattern, _named(expect, *names), scanner))
        others += names
    by_name = {tensor.name: tensor for tensor in tensors}
    for packed in stored.packed:
        row = _row(by_name[packed.name], pattern)
        checks.append(not_followed(row, packed.why, _named(expect, packed.name)))
    return checks, others


def _named(expect: Sequence[str], *names: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in expect for name in names)


def _row(tensor: StoredTensor, pattern: Pattern) -> TensorCheck:
    return TensorCheck("file", tensor.name, tensor.dtype, tensor.shape, str(pattern))


def _with_mask(
    tensor: StoredTensor,
    masks: MaskSet,
    parameters: Mapping[str, str],
    expected: bool,
    scanner: Scanner,
) -> TensorCheck:
    mask = masks.masks.get(tensor.name)
    if mask is None:
        row = replace(_row(tensor, TWO_FOUR), pattern="", skipped="not in the mask set")
        return unmatched(row, "expected to be sparse, but it has no mask") if expected else row
    parameter = parameters.get(tensor.name, tensor.name)
    row = replace(_row(tensor, mask.pattern), parameter=parameter)
    element = ELEMENT_TYPES.get(tensor.dtype)
    if element is None:
        return unmatched(row, f"values of type {tensor.dtype} cannot be checked")
    return masked_check(row, element, tensor.source, mask, scanner)


def _without_mask(
    tensor: StoredTensor, layout: Layout, pattern: NMPattern, expected: bool, scanner: Scanner
) -> TensorCheck:
    row, shape = _row(tensor, pattern), tensor.shape
    element, parts = ELEMENT_TYPES.get(tensor.dtype), layout.parts
    fitting = [axis for axis in layout.axes if element and countable(shape, axis, element, pattern)]
    if layout.gemm:
        row = replace(row, shape_verdict=shape_verdict(*layout.gemm, pattern))
    if element is None:
        reason = f"values of type {tensor.dtype} cannot be checked"
        if len(shape) > 1 and tensor.dtype not in WITHOUT_ZERO:
            return not_followed(row, reason, expected)
    elif not layout.axes:
        reason = "not a weight matrix"
    elif parts > 1 and shape[0] // parts % pattern.group:
        reason = (
            f"each of its {parts} groups has {shape[0] // parts} inputs, which cannot be checked in "
            f"groups of {pattern.group}"
        )
    # A depthwise kernel has no inputs to group, whatever its outputs are.
    elif not fitting or (family(shape) == "kernel" and layout.axes[0] not in fitting):
        reason = f"no axis of {list(shape)} can be checked in groups of {pattern.group}"
    else:
        scanned = scanner.scan(tensor.source, element, shape, fitting, pattern)
        return foreign_check(row, pattern, scanned, expected)
    row = replace(row, skipped=reason)
    return unmatched(row, f"expected to be sparse, but {reason}") if expected else row


def _missing(path: Path, masks: MaskSet, names: list[str]) -> list[str]:
    if not masks.masks:
        return ["There are no masks, so nothing was verified."]
    return [
        f"'{path}' has no tensor '{name}', which has a mask."
        for name in sorted(masks.masks.keys() - set(names))
    ]


def nothing_sparse(artefact: str, checks: Sequence[TensorCheck], pattern: NMPattern) -> list[str]:
    """Return a problem when nothing in a foreign artefact claims to be sparse."""
    if any(check.skipped is None for check in checks):
        return []
    lost = [check for check in checks if not check.followed]
    if lost:
        return [
            f"Nothing in '{artefact}' could be shown to be {pattern} sparse: {len(lost)} weights were "
            f"not followed, the first is '{lost[0].tensor}' "
            f"({(lost[0].skipped or '').removeprefix('not followed: ')})."
        ]
    return [f"Nothing in '{artefact}' is {pattern} sparse."]


def unmatched_globs(expect: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a problem for every name that was expected and is not there."""
    return [
        f"{NOTHING_CALLED} '{glob}', which was expected to be sparse."
        for glob in expect
        if not any(fnmatchcase(name, glob) for name in names)
    ]
