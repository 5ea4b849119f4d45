"""Each family's export at the combinations that several tests look at."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from nmsparse_deploy.ship.onnx import ExportResult, export_onnx
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from tests.fixtures.onnx_models import Case, case

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@dataclass(frozen=True)
class Exported:
    case: Case
    folder: Path
    result: ExportResult

    @property
    def path(self) -> Path:
        return self.folder / f"{self.result.name}.onnx"

    def run(self, inputs) -> np.ndarray:
        return OnnxRuntime.build(self.path, {"threads": 1}).run(inputs)[self.case.output]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """family, precision, opset -> its export; every combination is made once."""

    @lru_cache
    def make(family: str, precision: str, opset: int) -> Exported:
        chosen, folder = case(family), tmp_path_factory.mktemp("export")
        result = export_onnx(
            chosen.module,
            chosen.inputs(2, 8),
            folder,
            family,
            chosen.targets,
            precision=precision,
            opset=opset,
        )
        return Exported(chosen, folder, result)

    return lambda family, precision="fp32", opset=20: make(family, precision, opset)
