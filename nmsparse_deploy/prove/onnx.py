"""Verify the weights that an ONNX model multiplies by, along the axis that each node reduces."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import numpy as np

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern, Pattern
from nmsparse_deploy.prove.checkpoint import nothing_sparse, unmatched_globs
from nmsparse_deploy.prove.group_counter import ELEMENT_TYPES
from nmsparse_deploy.prove.onnx_graph import OnnxGraph, Untraced, WeightUse
from nmsparse_deploy.prove.onnx_tensor import dtype_name, element_name, source_of, stored_bytes
from nmsparse_deploy.prove.onnx_weight import UsedWeight
from nmsparse_deploy.prove.report import CLAIMS, TensorCheck, VerifyReport, judge
from nmsparse_deploy.prove.rows import foreign_check, masked_check, missed, unmatched
from nmsparse_deploy.prove.scan import Scanned, Scanner, stored_digest
from nmsparse_deploy.system.progress import Progress, silent
from nmsparse_deploy.system.sparse_cores import shape_verdict


class LinkedPlace(Protocol):
    """A place of a parameter in the graph, as the exporter wrote it down."""

    @property
    def node(self) -> str:
        """The node that multiplies by it; empty for any."""
        ...

    @property
    def tensor(self) -> str:
        """The stored tensor that holds it."""
        ...

    @property
    def axis(self) -> int:
        """The reduction axis in the layout of the stored tensor."""
        ...


Link = Mapping[str, Sequence[LinkedPlace]]
"""Parameter -> its places."""


def verify_onnx(
    path: str | Path,
    masks: MaskSet | None = None,
    link: Link | None = None,
    pattern: NMPattern = TWO_FOUR,
    expect: Sequence[str] = (),
    progress: Progress = silent,
) -> VerifyReport:
    """Verify an ONNX model; weights in external data are streamed, weights inside the file are in
    memory once.

    With masks and the link map of the export: every masked parameter is in the graph and holds as
    in `verify_checkpoint`, along the axis that its nodes reduce. Without: every weight is judged by
    its values. `expect` names tensors, nodes or modules (glob patterns) that have to be sparse. The
    graph is read anew; the link map is believed only where they agree. Raises `UsageError` when the
    model or its data is damaged, `MissingExtra` without onnx.
    """
    if masks is not None and link is None:
        raise UsageError(
            "To compare masks with an ONNX model, its link map is needed.",
            "give the file that export wrote beside the model, or verify without masks",
        )
    start, graph = time.perf_counter(), OnnxGraph(Path(path))
    run = _Run(graph, pattern, expect, progress)
    if masks is not None and link is not None:
        problems = run.linked(masks, link)
    else:
        problems = run.foreign()
    uses: list[WeightUse | Untraced] = [*graph.uses, *graph.untraced]
    names = [name for use in uses for name in run.names(use)]
    problems += unmatched_globs(expect, names)
    return VerifyReport(
        "onnx",
        str(path),
        tuple(run.checks),
        tuple(problems),
        run.scanner.bytes_read,
        time.perf_counter() - start,
    )


class _Run:
    """One verification: the rows so far, and what was already read."""

    def __init__(
        self, graph: OnnxGraph, pattern: NMPattern, expect: Sequence[str], progress: Progress
    ) -> None:
        self.graph, self.pattern, self.expect, self.progress = graph, pattern, expect, progress
        self.scanner = Scanner()
        self.checks: list[TensorCheck] = []
        self._scans: dict[object, tuple[Scanned, dict[int, str], list[str]]] = {}
        """By tensor, axis and part: the counts, the verdicts, what a zero point does."""
        self._digests: dict[str, str] = {}
        self._total = sum(
            stored_bytes(graph.tensors[name]) for name in {use.tensor for use in graph.uses}
        )

    def expected(self, use: WeightUse | Untraced) -> bool:
        """Tell whether the caller named this weight as one that has to be sparse."""
        return any(fnmatchcase(name, glob) for glob in self.expect for name in self.names(use))

    def names(self, use: WeightUse | Untraced) -> list[str]:
        """Return everything that `expect` may call a weight."""
        scopes = use.scopes if isinstance(use, WeightUse) else ()
        tensors = [use.tensor, *(use.others if isinstance(use, Untraced) else ())]
        plain = [self.graph.plain.get(name, name) for name in tensors]
        return [*tensors, *plain, use.node, *scopes, *(f"{scope}.weight" for scope in scopes)]

    def row(self, use: WeightUse, pattern: Pattern, parameter: str | None = None) -> TensorCheck:
        """Return an empty row for a use."""
        self.progress(
            f"verifying {use.tensor}", min(self.scanner.bytes_read, self._total), self._total
        )
        return TensorCheck(
            "onnx",
            use.tensor,
            use.dtype,
            use.shape,
            str(pattern),
            use.axis,
            parameter,
            use.node,
            shape_verdict=shape_verdict(use.k, use.n, pattern),
            problems=use.problems,
        )

    # --- with masks ---

    def linked(self, masks: MaskSet, link: Link) -> list[str]:
        """Check every masked parameter where the link map says it is; return the problems of no
        single tensor."""
        problems = [] if masks.masks else ["There are no masks, so nothing was verified."]
        done: set[int] = set()
        uses_of: dict[str, list[WeightUse]] = defaultdict(list)
        for use in self.graph.uses:
            uses_of[use.tensor].append(use)
        for parameter, mask in masks.masks.items():
            places = link.get(parameter, ())
            if not places:
                problems.append(
                    f"'{parameter}' has a mask, but the link map gives it no place in the model."
                )
            for place in places:
                uses = [use for use in uses_of[place.tensor] if place.node in ("", use.node)]
                if not uses:
                    problems.append(
                        f"'{parameter}' should be tensor '{place.tensor}' at node '{place.node}'; "
                        f"{self._why(place.tensor)}."
                    )
                for use in uses:
                    self.checks.append(self._masked(use, parameter, mask, place.axis))
                    done.add(id(use))
        linked = {check.tensor: check for check in self.checks}
        for use in self.graph.uses:
            if id(use) not in done:
                self.checks.append(self._unlinked(use, linked.get(use.tensor)))
        for item in self.graph.untraced:
            self.checks += self._untraced(item)
        return problems

    def _why(self, tensor: str) -> str:
        if tensor not in self.graph.tensors:
            return "the model has no such tensor"
        reasons = [item.reason for item in self.graph.untraced if item.tensor == tensor]
        return f"it {reasons[0]}" if reasons else "that node does not multiply by it"

    def _masked(self, use: WeightUse, parameter: str, mask: Mask, axis: int) -> TensorCheck:
        row = self.row(use, mask.pattern, parameter)
        problems = [*use.doubts, *([use.blind] if use.blind else [])]
        if use.zero is not None:
            problems.append(use.zero.moved())
        row = replace(row, problems=(*row.problems, *problems))
        if axis % len(use.shape) != use.axis:
            return unmatched(
                row, f"the link map says axis {axis}, but node '{use.node}' reduces axis {use.axis}"
            )
        fitted = fit_mask(mask, use)
        if fitted is None:
            return unmatched(
                row,
                f"its mask has shape {list(mask.shape)} and axis {mask.axis}, which do not fit "
                f"{list(use.shape)} and axis {use.axis}",
            )
        element = ELEMENT_TYPES.get(element_name(use.dtype))
        if element is None:
            return unmatched(row, f"values of type {use.dtype} cannot be checked")
        source = source_of(self.graph.tensors[use.tensor], self.graph.folder)
        return masked_check(row, element, source, fitted, self.scanner, digest=True)

    def _unlinked(self, use: WeightUse, linked: TensorCheck | None) -> TensorCheck:
        """Return the row of a use without a mask: no claim, unless it reads a pruned tensor along
        another axis."""
        row = self.row(use, self.pattern)
        if linked is not None and linked.axis != use.axis:
            return unmatched(
                row,
                f"conflict: node '{linked.node}' reduces axis {linked.axis} and node '{use.node}' "
                f"axis {use.axis}",
            )
        if row.problems:
            return row
        if self.expected(use) and linked is None:
            return unmatched(row, "expected to be sparse, but it has no mask")
        return replace(
            row,
            pattern="",
            skipped="not in the link map" if linked is None else "verified at another node",
        )

    # --- without ---

    def foreign(self) -> list[str]:
        """Judge every weight by its values; return the problems of no single tensor."""
        judged = [self._judged(use) for use in self.graph.uses]
        rows_of: dict[str, list[TensorCheck]] = defaultdict(list)
        for check, _ in judged:
            rows_of[check.tensor].append(check)
        for check, other in judged:
            row = _conflict(check, rows_of[check.tensor])
            self.checks.append(_wrong_axis(row, other, self.pattern) if row is check else row)
        for item in self.graph.untraced:
            self.checks += self._untraced(item)
        missed = next((check for check in self.checks if not check.followed), None)
        if missed is None or any(check.skipped is None for check in self.checks):
            return nothing_sparse(str(self.graph.path), self.checks, self.pattern)
        count = sum(not check.followed for check in self.checks)
        return [
            f"{count} weights of '{self.graph.path}' could not be followed, so it is not known whether "
            f"any is {self.pattern} sparse; the first is '{missed.tensor}' ({missed.skipped})."
        ]

    def _judged(self, use: WeightUse) -> tuple[TensorCheck, int | None]:
        """Return the row of a use, and the other axis along which its pattern lies, if it does."""
        row, expected = self.row(use, self.pattern), self.expected(use)
        values = UsedWeight(self.graph.tensors[use.tensor], self.graph.folder, use)
        row = replace(row, shape=values.shape)
        reason, looked_at = values.hidden(self.pattern)
        if reason:
            if expected:
                row = unmatched(row, f"expected to be sparse, but {reason}")
            if not looked_at:
                return _missed(row, reason, expected or bool(row.problems)), None
            return (row if row.problems else replace(row, skipped=reason)), None
        key = (use.tensor, use.axis, values.key)
        if key not in self._scans:
            self._scans[key] = self._scanned(use, values)
        scanned, verdicts, moved = self._scans[key]
        claims = expected or verdicts[use.axis] in CLAIMS
        problems = list(use.doubts) if claims else []
        if use.blind:
            if not claims:
                return _missed(row, use.blind, bool(row.problems)), None
            problems.append(use.blind)
        row = replace(row, problems=(*row.problems, *problems, *moved))
        own = replace(scanned, counts={use.axis: scanned.counts[use.axis]})
        checked = foreign_check(row, self.pattern, own, expected)
        first = checked.first_bad
        if first is not None:
            checked = replace(checked, first_bad=values.stored_place(first))
        if verdicts[use.axis] in CLAIMS and not expected:
            return checked, None
        return checked, next((axis for axis, said in verdicts.items() if said == "sparse"), None)

    def _scanned(
        self, use: WeightUse, values: UsedWeight
    ) -> tuple[Scanned, dict[int, str], list[str]]:
        """Count what a node multiplies by, once for all nodes that do."""
        scanned = values.scan(self.scanner, self.pattern)
        if scanned.sha256 is None:
            if use.tensor not in self._digests:
                self._digests[use.tensor] = stored_digest(values.source)
            scanned = replace(scanned, sha256=self._digests[use.tensor])
        verdicts: dict[int, str] = {
            axis: judge(count, self.pattern, scanned.outputs.get(axis))
            for axis, count in scanned.counts.items()
        }
        return scanned, verdicts, values.moved(self.scanner, self.pattern, verdicts[use.axis])

    def _untraced(self, item: Untraced) -> list[TensorCheck]:
        """Return a row for every matrix that went into what was not followed."""
        rows = []
        for name in (item.tensor, *item.others):
            tensor = self.graph.tensors.get(name)
            row = TensorCheck(
                "onnx",
                name,
                dtype_name(tensor) if tensor is not None else "",
                tuple(tensor.dims) if tensor is not None else (),
                str(self.pattern),
                node=item.node,
            )
            expected = self.expected(replace(item, tensor=name))
            if expected:
                row = unmatched(row, f"expected to be sparse, but it {item.reason}")
            rows.append(_missed(row, item.reason, expected))
        return rows


def _missed(row: TensorCheck, reason: str, fails: bool) -> TensorCheck:
    """Return the row of a weight whose `reason` goes on from its name."""
    return missed(row, reason.removeprefix("is "), fails)


def _conflict(row: TensorCheck, rows: Sequence[TensorCheck]) -> TensorCheck:
    """Fail the row of a tensor that is sparse along another of its reduction axes and not along
    this one."""
    sparse = next((o for o in rows if o.axis != row.axis and o.skipped is None and o.ok), None)
    if sparse is None or (row.skipped is None and not row.bad):
        return row
    return unmatched(
        row,
        f"conflict: node '{sparse.node}' reduces axis {sparse.axis}, along which it is sparse, and "
        f"node '{row.node}' axis {row.axis}, along which it is not",
    )


def _wrong_axis(row: TensorCheck, axis: int | None, pattern: NMPattern) -> TensorCheck:
    """Fail the row of a weight whose pattern lies along an axis that its node does not reduce."""
    if axis is None or axis == row.axis:
        return row
    problem = (
        f"it is {pattern} along axis {axis}, but node '{row.node}' reduces axis {row.axis}: "
        "the pattern lies along the wrong axis"
    )
    return replace(row, skipped=None, problems=(problem, *row.problems))


def fit_mask(mask: Mask, use: WeightUse) -> Mask | None:
    """Return the mask in the layout of the stored tensor: as it is, or with its last two axes
    exchanged; else None."""
    rank = len(mask.shape)
    lead = len(use.shape) - rank  # leading axes of length one add nothing
    if lead < 0 or any(size != 1 for size in use.shape[:lead]) or not -rank <= mask.axis < rank:
        return None
    shape, axis = use.shape[lead:], use.axis - lead
    if mask.shape == shape and mask.axis % rank == axis:
        return replace(mask, shape=use.shape, axis=use.axis)
    swap = {rank - 2: rank - 1, rank - 1: rank - 2}
    if (
        rank < 2
        or (*mask.shape[:-2], mask.shape[-1], mask.shape[-2]) != shape
        or swap.get(mask.axis % rank) != axis
    ):
        return None
    bits = np.unpackbits(mask.bits, count=int(np.prod(mask.shape)), bitorder="little").reshape(
        mask.shape
    )
    turned = np.packbits(bits.swapaxes(-1, -2).reshape(-1), bitorder="little")
    return replace(mask, bits=turned, shape=use.shape, axis=use.axis)
