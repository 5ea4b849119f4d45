"""The packaged vision transformer and sentence encoder, real weights and real data. Slow;
`make matrix`."""

from __future__ import annotations

import os

import pytest
import torch

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.data.images import evaluation_images
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.models.packaged import visual_saliency as saliency
from nmsparse_deploy.recipe import Evaluate, Export, Prune, Recipe
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from tests import ROOT

pytestmark = pytest.mark.matrix


def by_name(data, label):
    return {row["metric"]: row["value"] for row in data["results"][label]}


def test_the_converted_vit_computes_what_its_graph_computes():
    loaded = models.load("vit")
    photos = evaluation_images("photos-20", "test", loaded.processor, "pixel_values", 4).inputs[
        "pixel_values"
    ]
    graph = OnnxRuntime.build(saliency.graph_path(), {"optimization": "basic"})
    (expected,) = graph.run({"input_image": photos}).values()
    with torch.inference_mode():
        tokens = loaded.module(pixel_values=photos).last_hidden_state
        maps = saliency.load_head()(tokens)
    assert (maps - torch.from_numpy(expected[:, 0])).abs().max() < 1e-4
    assert 0.01 < (maps > 0.5).float().mean() < 0.9  # objects are found, and not everywhere


def test_the_tokens_of_the_converted_vit_are_those_of_the_graph(tmp_path):
    import onnx

    loaded = models.load("vit")
    photos = evaluation_images("photos-20", "test", loaded.processor, "pixel_values", 2).inputs[
        "pixel_values"
    ]
    model = onnx.load(str(saliency.graph_path()))
    last = [
        n
        for n in model.graph.node
        if n.op_type == "Transpose"
        and n.output[0]
        in {i for m in model.graph.node if m.output[0] == "/Reshape_output_0" for i in m.input}
    ]
    name = last[0].input[0]  # patch tokens, right before they become a picture for the head
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    onnx.save(model, str(tmp_path / "tokens.onnx"))
    found = OnnxRuntime.build(tmp_path / "tokens.onnx").run({"input_image": photos})[name]
    with torch.inference_mode():
        tokens = loaded.module(pixel_values=photos).last_hidden_state[:, 1:]
    assert (tokens - torch.from_numpy(found)).abs().max() < 2e-4


def test_the_vit_through_every_stage(tmp_path):
    recipe = Recipe.load(ROOT / "recipes/vit.yaml")
    spec = recipe.evaluate.model_copy(update={"images": 200, "probe": 600})
    run = nms.run_recipe(
        recipe.model_copy(
            update={
                "prune": Prune(
                    calibration=recipe.prune.calibration.model_copy(update={"samples": 32})
                ),
                "export": Export(precisions=("fp32",)),
                "evaluate": spec,
                "bench": None,
            }
        ),
        tmp_path / "vit",
    )
    data = run.read_json("evaluate.json")
    dense, pruned = by_name(data, "dense"), by_name(data, "pruned")
    assert (
        dense["probe_top1@fashion-mnist-112px"] > 0.7
        and pruned["probe_top1@fashion-mnist-112px"] > 0.65
    )
    assert (
        pruned["saliency_correlation@photos-20-224px"] > 0.75
        and pruned["token_cosine@photos-20-224px"] > 0.7
    )
    assert len(data["images"]) == 6 and data["held_out"]["overlaps"] == 0
    (row,) = run.read_json("export.json")["files"]
    assert row["agreement"]["max_abs"] < 1e-3 and row["links"] == 72


def test_the_sentence_encoder(tmp_path):
    recipe = Recipe.load(ROOT / "recipes/minilm.yaml")
    calibration = recipe.prune.calibration.model_copy(update={"samples": 128})
    run = prune("minilm", Prune(calibration=calibration), tmp_path / "minilm")
    data = nms.evaluate(run, Evaluate(data="word-pairs"))
    dense, pruned = by_name(data, "dense"), by_name(data, "pruned")
    assert dense["sts_spearman@wordsim353"] == pytest.approx(
        0.729, abs=0.01
    )  # its published neighbourhood
    assert pruned["sts_spearman@wordsim353"] > 0.6
    (row,) = nms.export(run, Export(precisions=("fp32",)))
    assert row.agreement.max_abs < 1e-3 and row.links == 36


@pytest.mark.skipif(not os.environ.get("NMSPARSE_DATA"), reason="NMSPARSE_DATA is not set")
def test_development_data_is_found():
    loaded = models.load("vit")
    sample = evaluation_images("cifar10", "test", loaded.processor.at(112), "pixel_values", 20)
    assert len(set(sample.labels)) == 10 and sample.inputs["pixel_values"].shape == (
        20,
        3,
        112,
        112,
    )
    assert set(evaluation_images("photos", "test", loaded.processor, "pixel_values", 3).labels) == {
        None
    }
