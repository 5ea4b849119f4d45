"""What `torch.json` holds: the packed models of a run, and what every GEMM was decided to run
on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from nmsparse_deploy.prove.agreement import Agreement, NotCompared, compared
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.torch_sparse.artefact import FILE, PackedSizes
from nmsparse_deploy.ship.torch_sparse.kernel_choice import Decisions

FOLDER, RECORD = "torch", "torch.json"


@dataclass(frozen=True, kw_only=True)
class PackedModel(PackedSizes):
    """One packed model of a run."""

    precision: str
    path: str
    verified: int
    """Weights that were held against their masks."""
    agreement: Agreement | NotCompared | None = None
    decisions: Decisions | None = None
    not_checked: str | None = None
    """Why no GEMM is decided."""

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "decisions": self.decisions.to_json() if self.decisions else None}

    def lines(self, path: Path) -> list[str]:
        """Return the record in sentences; `path` is where the model lies."""
        lines = [f"{path}: no weight could be packed"]
        if self.share is not None:
            lines = [
                f"{path}: {self.weights} weights packed to {self.packed_bytes / 1e6:.1f} MB, {self.share:.1%} of "
                f"their {self.dense_bytes / 1e6:.1f} MB in {self.precision}; {self.verified} verified"
            ]
        lines += [f"  stored with its zeros: {name} ({why})" for name, why in self.kept.items()]
        lines += [f"  {compared(self.agreement)}"] if self.agreement else []
        made = self.decisions
        if made is None:
            return [*lines, f"  not timed here, so no GEMM is decided: {self.not_checked}"]
        lines.append(
            f"  {made.kept_sparse} of {len(made.gemms)} GEMM shapes run sparse on {made.gpu}"
        )
        return lines + [
            f"  {gemm.k} x {gemm.n} ({len(gemm.weights)} weights): {gemm.keep}, {gemm.why}"
            for gemm in made.gemms
        ]


@dataclass(frozen=True)
class PackedFile:
    """`torch.json`."""

    artefacts: tuple[PackedModel, ...]


def packed_models(run: RunDir) -> list[Path]:
    """Return folders of the run's packed models."""
    return sorted(file.parent for file in (run / FOLDER).glob(f"*/{FILE}"))
