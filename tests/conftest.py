from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import torchvision_cpu  # noqa: F401 - before anything looks for torchvision

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never ask a model hub

from hypothesis import settings

from tests import pico

settings.register_profile("fast", deadline=None, max_examples=40)
settings.load_profile("fast")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(pico.llama(), tmp_path_factory.mktemp("models") / "pico-llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {"calibration": pico.text(folder, "calibration.txt", 1), "held_out": pico.text(folder, "held_out.txt", 2)}
