"""The stage files of a run, read once. A missing stage is None; a damaged one is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.runs.wording import clean


@dataclass(frozen=True)
class Stages:
    """What the run holds so far."""

    path: Path
    manifest: dict[str, Any]
    plan: dict[str, Any] | None
    layers: list[dict[str, Any]]
    verify: dict[str, Any] | None
    evaluate: dict[str, Any] | None
    export: dict[str, Any] | None
    bench: dict[str, Any] | None
    engines: dict[str, Any] | None
    torch: dict[str, Any] | None
    bench_gpu: dict[str, Any] | None

    @classmethod
    def read(cls, run: RunDir) -> Stages:
        """Raises `UsageError` when nothing is pruned yet or a file is damaged."""
        manifest = clean(run.manifest())
        if not (run / "layers.json").is_file():
            raise UsageError(f"The run '{run.path}' is not pruned yet.",
                             "nmsparse-deploy prune with the same options resumes it")
        return cls(run.path, manifest, _read(run, "plan.json", dict), _read(run, "layers.json", list) or [],
                   _read(run, "verify.json", dict), _read(run, "evaluate.json", dict), _read(run, "export.json", dict),
                   _read(run, "bench.json", dict), _read(run, "engines.json", dict),
                   _read(run, "torch.json", dict), _read(run, "bench-gpu.json", dict))

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """While `name` is taken apart: a field that is missing or of another kind means that the file is damaged."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"'{self.path / name}' is damaged: {what}.", _remedy(name)) from error


def _read(run: RunDir, name: str, kind: type) -> Any:
    if not (run / name).is_file():
        return None
    data = clean(run.read_json(name))
    if not isinstance(data, kind):
        raise UsageError(f"'{run / name}' is damaged: expected a {kind.__name__} at the top.", _remedy(name))
    return data


def _remedy(name: str) -> str:
    stage = Path(name).stem
    known = {name: name for name in ("verify", "evaluate", "export", "bench")} | {
        "engines": "build", "torch": "export --torch", "bench-gpu": "bench --device cuda"}
    if stage in known:
        return f"nmsparse-deploy {known[stage]} writes it again"
    return "nmsparse-deploy prune --force starts over"
