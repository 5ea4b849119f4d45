"""The support table is what the code does: every family through every column (slow,
`make matrix`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ROOT
from tests.fixtures import pico
from tests.fixtures import small_vision as small
from tests.fixtures.family_check import COLUMNS, YES, check
from tests.fixtures.zoo import FAMILIES

TABLE = json.loads((ROOT / "results/families.json").read_text())["families"]
REQUIRED = (
    "OPT",
    "LLaMA",
    "BLOOM",
    "Baichuan-style",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "GPT-2",
    "GPT-NeoX",
    "Mixtral",
    "BERT",
    "T5",
    "timm ViT",
    "DINOv2",
    "Swin",
    "timm Swin",
    "LLaVA",
    "Gemma 3 (vision)",
    "Idefics3",
    "DiT",
    "PixArt",
    "SD3 (MMDiT)",
)
FAST = ("BLOOM", "Mixtral", "Whisper", "SD3 (MMDiT)")
NEEDS = {
    "timm": "timm",
    "DiT": "diffusers",
    "PixArt": "diffusers",
    "SD3": "diffusers",
    "SD3.5": "diffusers",
}


def test_the_table_has_every_family_and_the_promised_ones_pass():
    assert list(TABLE) == list(FAMILIES)
    for name in REQUIRED:
        assert {TABLE[name][column] for column in COLUMNS} == {YES}, name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    text, pictures = pico.text(folder, "calibration.txt", 1), small.labelled(folder / "pictures")
    return {"text": text, "pictures": pictures, "both": f"{pictures}+{text}"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.matrix) for n in FAMILIES]
)
def test_a_family_does_what_the_table_says(name, data, tmp_path):
    if name.partition(" ")[0] in NEEDS:
        pytest.importorskip(NEEDS[name.partition(" ")[0]])
    row = check(name, tmp_path, data)
    assert {column: row[column] == YES for column in COLUMNS} == {
        column: TABLE[name][column] == YES for column in COLUMNS
    }, row
