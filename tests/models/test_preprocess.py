"""What a model sees is what the stock library would show it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from nmsparse_deploy.models.preprocess import Preprocess, from_config
from tests.fixtures import small_vision as small

CONFIG = SimpleNamespace(image_size=40, num_channels=3)
FILES = {
    "crop": {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 48},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 40, "width": 40},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    },
    "squeeze": {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 24},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "plain": {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_equal_to_the_image_processor_of_transformers(name, tmp_path):
    ours = from_config(CONFIG, FILES[name])
    ours.save_pretrained(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    for width, height in ((60, 45), (45, 60), (200, 50)):
        image = small.picture("red", 3, 64).resize((width, height))
        expected = torch.as_tensor(
            np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
        )
        got = ours(image)
        assert got.shape == expected.shape
        assert (
            got - expected
        ).abs().mean() < 2e-2  # the side that is rounded may differ by a pixel


def test_without_a_file_the_config_decides(tmp_path):
    found = from_config(SimpleNamespace(image_size=[30, 50], num_channels=1))
    assert found.size == (30, 50) and len(found.mean) == 1
    assert found(small.picture("red", 0)).shape == (1, 30, 50)
    found.save_pretrained(tmp_path)


def test_another_size_keeps_the_crop_share():
    big = Preprocess((224, 224), 256).at(112)
    assert (big.size, big.shorter) == ((112, 112), 128)
    assert Preprocess((224, 224), 256).at(0) == Preprocess((224, 224), 256)
    assert Preprocess((32, 32), None).at(64).shorter is None


def test_grey_and_transparent_pictures_become_rgb():
    image = small.picture("red", 0)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert Preprocess((16, 16), 16)(image.convert(mode)).shape == (3, 16, 16)
