"""Models by their hub name, fetched over HTTP from a hub that runs in the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nmsparse_deploy.models import hub_name
from tests.fixtures.hub import COMMIT, GATED, hub
from tests.fixtures.zoo import FAMILIES

NAMES = {"a/llama": "LLaMA", "a/dit": "DiT", "a/vit": "timm ViT"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The repositories, the diffusion transformer as part of a pipeline that also has other files
    of weights."""
    found = {}
    for name, family in NAMES.items():
        place = found[name] = tmp_path_factory.mktemp("hub") / "repository"
        whole = place / "transformer" if name == "a/dit" else place
        whole.mkdir(parents=True)
        FAMILIES[family].build(whole)
    (found["a/llama"] / "NOTICE").write_text("Fetched, for it is no weight.")
    pipeline = found["a/dit"]
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    (pipeline / "transformer/scheduler").rename(pipeline / "scheduler")
    weights = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    weights.with_suffix(".fp16.safetensors").write_bytes(weights.read_bytes())
    (pipeline / "transformer/notes.bin").write_bytes(b"not needed")
    return found


def python(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A process that knows this hub and nothing of another one's cache."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in offline},
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def typed(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(address, home, "-m", "nmsparse_deploy", *arguments)


WEIGHTS = {
    "a/llama": "model.safetensors",
    "a/dit": "transformer/diffusion_pytorch_model.safetensors",
    "a/vit": "model.safetensors",
}


@pytest.mark.parametrize(
    "source,name,library,layers",
    [
        ("a/llama", "a/llama", None, 14),
        ("diffusers:a/dit", "a/dit", "diffusers", 12),
        ("timm:hf-hub:a/vit", "a/vit", "timm", 8),
    ],
)
def test_a_model_is_pruned_by_its_name_and_only_its_weights_are_fetched(
    source, name, library, layers, folders, tmp_path
):
    if library:
        pytest.importorskip(library)
    with hub(folders) as (address, asked):
        done = typed(
            address,
            tmp_path / "home",
            "prune",
            source,
            "--method",
            "magnitude",
            "--out",
            str(tmp_path / "run"),
        )
    assert done.returncode == 0 and f"{layers} layers pruned" in done.stdout, done.stderr
    assert [file for file in asked if file.endswith((".safetensors", ".bin"))] == [
        f"{name}/{WEIGHTS[name]}"
    ]
    manifest = (tmp_path / "run/manifest.json").read_text()
    assert (tmp_path / "run/model/NOTICE").is_file() == (source == "a/llama")  # not asked of others
    assert hub_name(source) == name and COMMIT in manifest


def test_a_model_that_was_never_here_is_streamed_at_once(folders, tmp_path):
    """Its files are downloaded without being loaded, so what is larger than memory can be named by
    its hub name."""
    ask = "from nmsparse_deploy.find.offload import load_fitting as load; print(load('a/llama', limit=10**12).streamed)"
    with hub(folders) as (address, asked):
        done = python(address, tmp_path, "-c", ask)
    assert done.stdout.strip() == "True", done.stderr
    assert [file for file in asked if file.endswith(".safetensors")] == [
        "a/llama/model.safetensors"
    ]


@pytest.mark.parametrize(
    "source,code,sentence",
    [
        ("a/nothing", 2, "There is no model 'a/nothing' on the hub"),
        ("diffusers:a/nothing", 2, "There is no model 'a/nothing' on the hub"),
        (GATED, 1, "is gated"),
        (f"diffusers:{GATED}", 1, "is gated"),
        (f"timm:hf-hub:{GATED}", 1, "is gated"),
        ("timm:hf-hub:a/nothing", 2, "There is no model 'timm:hf-hub:a/nothing' on the hub"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(source, code, sentence, tmp_path):
    if source.startswith("diffusers"):
        pytest.importorskip("diffusers")
    if source.startswith("timm"):
        pytest.importorskip("timm")
    with hub({}) as (address, _):
        done = typed(address, tmp_path, "inspect", source)
    assert done.returncode == code and sentence in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
