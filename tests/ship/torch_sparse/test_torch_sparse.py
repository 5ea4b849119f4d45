"""From a run to a packed PyTorch model and back: the same numbers, the promised size, and a
sentence for everything wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.models import load
from nmsparse_deploy.recipe import Pack
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.torch_sparse.artefact import DECISIONS, FILE, Artefact, verify_packed
from nmsparse_deploy.ship.torch_sparse.engine import TorchSparse
from nmsparse_deploy.ship.torch_sparse.linear import Sparse
from nmsparse_deploy.ship.torch_sparse.record import PackedModel
from nmsparse_deploy.ship.torch_sparse.semi_structured import StandIn, standing_in
from nmsparse_deploy.ship.torch_sparse.stage import export_torch
from nmsparse_deploy.system.gpu_clock import dry_machine
from tests.fixtures import pico

IDS = {"input_ids": torch.arange(24).view(2, 12)}


def pruned(source, out) -> RunDir:
    assert (
        invoke(
            lambda: app(
                ["--quiet", "prune", str(source), "--method", "magnitude", "--out", str(out)]
            )
        )
        == 0
    )
    return RunDir(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, RunDir]:
    """Pruned by magnitude and packed in fp16: a Llama with tied embeddings, and a GPT-2, whose
    weights lie the other way."""
    folder = tmp_path_factory.mktemp("packed")
    made = {"llama": pico.llama(tie_word_embeddings=True), "gpt2": pico.gpt2()}
    found = {
        name: pruned(pico.save(module, folder / name), folder / f"{name}-run")
        for name, module in made.items()
    }
    for run in found.values():
        export_torch(run, Pack())
    return found


@pytest.fixture
def llama(runs, tmp_path) -> RunDir:
    return RunDir(shutil.copytree(runs["llama"].path, tmp_path / "run"))


def outputs(folder, mode: str, **more):
    return TorchSparse.build(folder, {"mode": mode, "device": "cpu", **more}).run(IDS)["logits"]


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_the_packed_model_is_the_pruned_one(runs, name):
    run = runs[name]
    reference = load(str(run / "model"), torch.float16).module
    with torch.inference_mode():
        wanted = reference(**IDS).logits.float().numpy()
    assert abs(outputs(run / "torch/fp16", "dense") - wanted).max() < (
        1e-3 if name == "llama" else 0.01
    )
    with standing_in(StandIn()):
        found = outputs(run / "torch/fp16", "sparse")
        layers = TorchSparse.build(run / "torch/fp16", {"mode": "sparse"}).layers()
    assert all(isinstance(layer, Sparse) for layer in layers.values()) and len(layers) == len(
        _masks(run).masks
    )
    assert abs(found - wanted).max() < 0.01


def _masks(run: RunDir) -> MaskSet:
    return MaskSet.load(run / "masks.safetensors")


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_no_dense_weight_is_stored_and_the_size_is_nine_sixteenths(runs, name):
    row = runs[name].read_json("torch.json")["artefacts"][0]
    assert row["share"] == 9 / 16 and row["weights"] == len(_masks(runs[name]).masks)
    with safe_open(runs[name] / "torch/fp16" / FILE, framework="pt") as file:
        names = set(file.keys())
    assert not names & set(_masks(runs[name]).masks)
    assert row["packed_bytes"] < row["file_bytes"] and "not_checked" not in row["agreement"]


def test_every_mask_is_verified_in_the_packed_file(llama):
    assert verify_packed(llama / "torch/fp16", _masks(llama)).checked == 14
    path = llama / "torch/fp16" / FILE
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if key.endswith(".places"))
    tensors[key] = torch.full_like(tensors[key], 0b11100100)  # the places 0, 1 and 2, 3
    save_file(tensors, path, metadata)
    report = verify_packed(llama / "torch/fp16", _masks(llama))
    assert report.failed == 1 and key.removesuffix(".places") in report.failures()[0]


@pytest.mark.parametrize("precision,share", (("bf16", 9 / 16), ("int8", 10 / 16), ("fp8", 10 / 16)))
def test_other_precisions(llama, texts, precision, share):
    with standing_in(StandIn()):
        row = (
            export_torch(
                llama, Pack(precisions=(precision,), rows=(16,), rounds=5), machine=dry_machine()
            )[0]
            if precision == "bf16"
            else _eight(llama, texts, precision)
        )
        assert row.share == share and row.verified == 14
        wanted = load(str(llama / "model")).module.float()(**IDS).logits.detach()
        found = torch.from_numpy(outputs(llama / f"torch/{precision}", "sparse"))
    assert (found - wanted).norm() / wanted.norm() < 0.1
    if precision != "bf16":
        layers = TorchSparse.build(
            llama / f"torch/{precision}", {"mode": "dense", "device": "cpu"}
        ).layers()
        assert {layer.kind for layer in layers.values()} == {
            {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
        }


def _eight(run: RunDir, texts, precision: str) -> PackedModel:
    """With the calibration sample of the run set to something that is here."""
    manifest = run.read_json("manifest.json")
    manifest["recipe"]["calibration"] |= {
        "data": str(texts["calibration"]),
        "samples": 4,
        "length": 32,
    }
    run.write_json("manifest.json", manifest)
    return export_torch(run, Pack(precisions=(precision,)))[0]


def test_decisions_are_followed(llama):
    with standing_in(StandIn()):
        row = export_torch(llama, Pack(rows=(16, 24), rounds=5), machine=dry_machine())[0]
        made = json.loads(json.dumps(row.decisions.to_json()))
        assert (
            made["dry"]
            and made["shapes"] == 4
            and sum(len(one["weights"]) for one in made["gemms"]) == 14
        )
        kept = made["gemms"][0]["weights"]
        for number, one in enumerate(made["gemms"]):
            one["keep"] = "sparse" if number == 0 else "dense"
        (llama / "torch/fp16" / DECISIONS).write_text(json.dumps(made))
        layers = TorchSparse.build(llama / "torch/fp16", {"mode": "auto", "device": "cpu"}).layers()
        assert {name for name, layer in layers.items() if isinstance(layer, Sparse)} == set(kept)
        assert set(layers[kept[0]].settings) == {16, 24}
        (llama / "torch/fp16" / DECISIONS).write_text(json.dumps({**made, "gpu": "NVIDIA Other"}))
        with pytest.raises(UsageError, match="were made on NVIDIA Other"):
            outputs(llama / "torch/fp16", "auto")


def test_what_is_missing_is_one_sentence(llama, tmp_path):
    folder = llama / "torch/fp16"
    if not torch.cuda.is_available():
        row = llama.read_json("torch.json")["artefacts"][0]
        assert row["decisions"] is None and "needs an NVIDIA GPU" in row["not_checked"]
        with pytest.raises(NmsparseError, match="Sparse kernels cannot run fp16 here"):
            outputs(folder, "sparse")
    with pytest.raises(UsageError, match="not timed yet"):
        outputs(folder, "auto")
    with pytest.raises(UsageError, match="holds no packed model"):
        TorchSparse.build(tmp_path, {})
    with pytest.raises(UsageError, match="no setting 'speed'"):
        TorchSparse.build(folder, {"speed": 1})
    (folder / DECISIONS).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        outputs(folder, "auto")


@pytest.mark.parametrize("damage", ("truncated", "another format", "a tensor is gone"))
def test_a_damaged_file_is_one_sentence(llama, damage):
    path = llama / "torch/fp16" / FILE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if damage == "a tensor is gone":
            tensors.pop("model.norm.weight")
        save_file(tensors, path, {"format": "pt"} if damage == "another format" else metadata)
    with pytest.raises(UsageError, match=r"packed\.safetensors"):
        outputs(llama / "torch/fp16", "dense")


def test_a_weight_that_fp16_cannot_hold_is_refused(llama):
    module = load(str(llama / "model"))
    module.module.model.embed_tokens.weight.data[0, 0] = 1e6
    shutil.rmtree(llama / "model")
    module.save(llama / "model")
    with pytest.raises(NmsparseError, match="fp16 cannot hold"):
        export_torch(llama, Pack())
    assert Artefact(llama / "torch/fp16").entries  # the artefact before it is still there


def test_the_command_line(llama, capfd):
    assert (
        invoke(lambda: app(["--json", "export", str(llama.path), "--torch", "--precision", "bf16"]))
        == 0
    )
    data = json.loads(capfd.readouterr().out)
    assert data["artefacts"][0]["path"] == "torch/bf16" and data["artefacts"][0]["verified"] == 14
    assert {row["precision"] for row in llama.read_json("torch.json")["artefacts"]} == {
        "fp16",
        "bf16",
    }
    assert invoke(lambda: app(["verify", str(llama.path)])) == 0
    assert "torch/bf16" in capfd.readouterr().out
    assert invoke(lambda: app(["export", str(llama.path), "--torch", "--precision", "fp32"])) == 2
    if not torch.cuda.is_available():
        for command in (
            ["bench", str(llama.path), "--device", "cuda"],
            ["crossover", "--shape", "64x64"],
        ):
            assert invoke(lambda command=command: app(command)) == 1
            assert "needs an NVIDIA GPU" in capfd.readouterr().err
    assert invoke(lambda: app(["bench", str(llama.path), "--device", "tpu"])) == 2
    assert invoke(lambda: app(["crossover", "--shape", "64by64"])) == 2


@pytest.mark.parametrize("change", ("narrower layer", "wider embedding", "unknown name"))
def test_a_file_of_another_model_is_one_sentence(llama, change):
    folder = llama / "torch/fp16"
    config = json.loads((folder / "config.json").read_text())
    if change == "unknown name":
        tensors = load_file(folder / FILE)
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata()
        save_file({**tensors, "model.extra.weight": torch.ones(2)}, folder / FILE, metadata)
    else:
        config |= {"intermediate_size": 64} if change == "narrower layer" else {"vocab_size": 300}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"does not fit its config\.json"):
        outputs(folder, "dense")


def test_a_graph_needs_a_device(llama):
    with pytest.raises(UsageError, match="CUDA graph needs a CUDA device"):
        outputs(llama / "torch/fp16", "dense", cuda_graph=True)
