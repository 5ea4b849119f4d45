from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fixtures import torchvision_cpu  # noqa: F401 - before anything looks for torchvision

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never ask a model hub

from hypothesis import settings

from tests.fixtures import pico, small_vision

settings.register_profile("fast", deadline=None, max_examples=40)
settings.load_profile("fast")


collect_ignore = (
    []
    if find_spec("diffusers")
    else [
        "data/test_latents.py",
        "models/test_diffusers.py",
        "measure/evaluate/test_diffusion.py",
        "measure/evaluate/test_diffusion_matrix.py",
    ]
)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(pico.llama(), tmp_path_factory.mktemp("models") / "pico-llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {
        "calibration": pico.text(folder, "calibration.txt", 1),
        "held_out": pico.text(folder, "held_out.txt", 2),
    }


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return small_vision.labelled(tmp_path_factory.mktemp("pictures") / "colours")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return small_vision.photos(tmp_path_factory.mktemp("photos") / "photos")
