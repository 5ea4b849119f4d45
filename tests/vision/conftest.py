from __future__ import annotations

from pathlib import Path

import pytest

from tests.vision import small


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return small.labelled(tmp_path_factory.mktemp("pictures") / "colours")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return small.photos(tmp_path_factory.mktemp("photos") / "photos")
