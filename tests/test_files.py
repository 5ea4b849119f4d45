"""Files of the tests are described where they lie."""

from __future__ import annotations

import pytest

from tests import ROOT


@pytest.mark.parametrize("folder", ["golden/tensorrt", "golden/verify", "hostile"])
def test_every_file_is_described_and_every_described_file_is_there(folder):
    here = ROOT / "tests" / folder
    readme = next(
        path / "README.md" for path in (here, here.parent) if (path / "README.md").is_file()
    )
    text = readme.read_text(encoding="utf-8")
    for file in here.iterdir():
        named = f"`{file.name}`" in text or (
            file.name.startswith("inspector-") and "`inspector-*.json`" in text
        )
        assert file.name == "README.md" or named, file
    folders = [here, ROOT / "tests/golden/verify"]
    for row in (line for line in text.splitlines() if line.startswith("| `")):
        for name in row.split("|")[1].replace("`", "").split(","):
            assert name.strip().endswith("/") or any(
                list(place.glob(name.strip())) for place in folders
            ), name
