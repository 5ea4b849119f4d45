"""Every model family comes back from its packed file as it was, without its dense weights."""

from __future__ import annotations

import shutil

import pytest
import torch

from nmsparse_deploy import models
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.meta_model import description
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.ship.torch_sparse.artefact import write
from nmsparse_deploy.ship.torch_sparse.engine import TorchSparse
from tests.fixtures.zoo import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_family_gives_what_the_pruned_model_gives(name, tmp_path):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    FAMILIES[name].build(tmp_path / "model")
    loaded = models.load(str(tmp_path / "model"), torch.float16)
    inputs = loaded.sample_inputs()
    targets = discover(loaded.module, inputs).targets
    masks = {}
    for target in targets:
        weight = loaded.module.get_parameter(target.name)
        if weight.shape[target.axis] % TWO_FOUR.group:
            continue
        kept = project(weight.detach().abs(), TWO_FOUR, target.axis)
        masks[target.name] = Mask.pack(kept, target.axis, TWO_FOUR, "")
        weight.data = torch.where(kept, weight.data, 0.0)
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in description(tmp_path / "model"):
        shutil.copy(file, folder)
    facts = write(folder, loaded, MaskSet(masks), targets, "fp16", {})
    assert facts.weights + len(facts.kept) == len(masks) and facts.weights
    with torch.inference_mode():
        output = loaded.module(**inputs)
    found = TorchSparse.build(folder, {"mode": "dense", "device": "cpu"}).run(inputs)
    named = {"output": output} if isinstance(output, torch.Tensor) else dict(output.items())
    key, wanted = next(
        (key, value) for key, value in named.items() if isinstance(value, torch.Tensor)
    )
    gap = (torch.from_numpy(found[key]) - wanted.float()).norm() / wanted.float().norm()
    assert gap < 0.01, key
