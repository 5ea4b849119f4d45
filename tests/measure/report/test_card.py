"""The model card says what the run measured; a run is published whole, in one commit, or one
sentence says why not."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.measure.report.card import model_card
from nmsparse_deploy.measure.report.hub import published
from nmsparse_deploy.recipe import Prune, validate
from tests.fixtures import pico
from tests.fixtures.run_folder import make_run
from tests.measure.report.test_report_views import HOSTILE

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def native(texts, tmp_path_factory):
    """A run of a model with everything that a published folder has: settings for generation, a chat
    template."""
    module, tokenizer = pico.llama(), pico.tokenizer()
    module.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=256
    )
    tokenizer.chat_template = TEMPLATE
    source = tmp_path_factory.mktemp("native") / "pico-native"
    module.save_pretrained(source)
    tokenizer.save_pretrained(source)
    spec = validate(
        Prune,
        {
            "method": "wanda",
            "calibration": {"data": str(texts["calibration"]), "samples": 4, "length": 32},
        },
    )
    return prune(str(source), spec, source.parent / "run")


def test_a_saved_folder_is_a_native_one(native):
    folder = native / "model"
    AutoModelForCausalLM.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert (
        said == "<user>hi" and tokenizer("ab")["input_ids"] == pico.tokenizer()("ab")["input_ids"]
    )


def test_the_card_says_what_the_run_holds(tmp_path):
    run = make_run(tmp_path / "run", model="owner/pico")
    (run / "model/config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    text = model_card(run)
    data = front(text)
    assert data["base_model"] == "owner/pico" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and {"sparse", "2:4"} <= set(data["tags"])
    value = run.read_json("evaluate.json")["results"]["pruned"]["value"]
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert (
        metric == {"type": "token_ppl@16", "value": value, "verified": False}
        or metric["value"] == value
    )
    low = run.read_json("evaluate.json")["ratio"]["low"]
    plain = text.replace("\\", "")
    assert "± " in plain and "95 % interval" in plain and f"{low:.1f}"[:3] in plain
    assert "| saved model | 4 | 0 |" in plain and run.manifest().fingerprint in plain
    assert "method: sparsegpt" in text and "AutoModel" not in text.split("## Use")[0]
    assert str(ModelCard(text).data.base_model) == "owner/pico"  # the hub's own reader takes it


def test_a_card_without_results_says_so(tmp_path):
    text = model_card(make_run(tmp_path / "run", stages=()))
    assert "Not evaluated" in text and "Not verified" in text and "model-index" not in text


def test_nothing_of_a_local_path_is_told(native):
    text = model_card(native)
    assert str(native.path.parent) not in text and "base_model" not in front(text)


def test_strings_from_files_stay_text(tmp_path):
    run = make_run(tmp_path / "run", model=f"dir/{HOSTILE.replace('/', '')}")
    text = model_card(run)
    assert front(text)["tags"] and len(text.split("---\n")) == 3
    outside = "\n".join(
        line for line in text.split("---\n", 2)[2].splitlines() if not line.startswith("    ")
    )
    assert not re.search(r"(?<!\\)<(?!br>)", outside) and "](http" not in outside


@pytest.mark.parametrize(
    "source,name",
    [
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("vit", None),
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("gpt2", "gpt2"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("timm:x?checkpoint=f.pth", None),
        ("/a/b", None),
        ("./a", None),
        ("a.gguf", None),
    ],
)
def test_names_on_the_hub(source, name):
    assert models.hub_name(source) == name


class FakeApi:
    """What a hub would be asked."""

    commits: ClassVar[list] = []
    refuses: Exception | None = None

    def create_repo(self, repo, private, exist_ok):
        if self.refuses:
            raise self.refuses
        return SimpleNamespace(repo_id=repo)

    def create_commit(self, repo, operations, commit_message):
        self.commits.append(
            (repo, {op.path_in_repo: op.path_or_fileobj for op in operations}, commit_message)
        )
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(FakeApi, "commits", [])
    monkeypatch.setattr(FakeApi, "refuses", None)
    return FakeApi


def test_one_commit_holds_everything(hub, native, capfd):
    code = invoke(lambda: app(["--json", "report", str(native.path), "--push-to-hub", "me/pico"]))
    assert (
        code == 0
        and json.loads(capfd.readouterr().out)["published"] == "https://hub/me/pico/commit/1"
    )
    ((repo, files, _),) = hub.commits
    assert (
        repo == "me/pico"
        and {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
            "nmsparse/masks.safetensors",
        }
        <= files.keys()
    )
    assert [name for name in files if name.endswith(".safetensors") and "/" not in name] == [
        "model.safetensors"
    ]


def test_a_broken_run_is_not_published(hub, native, tmp_path):
    import shutil

    from safetensors.torch import save_file

    from nmsparse_deploy.runs.run_dir import RunDir

    shutil.copytree(native.path, tmp_path / "run")
    weights = tmp_path / "run/model/model.safetensors"
    state = load_file(weights)
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones_like(
        state["model.layers.0.mlp.up_proj.weight"]
    )
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(CheckFailed, match="not published"):
        nms.publish(RunDir(tmp_path / "run"), "me/pico")
    assert not hub.commits


def test_without_a_token_nothing_is_tried(monkeypatch, hub, native):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(NmsparseError, match="no Hugging Face token") as caught:
        nms.publish(native, "me/pico")
    assert "hf auth login" in caught.value.hint and not hub.commits


def refused(status: int) -> Exception:
    error = RuntimeError("no")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    "error,kind,sentence",
    [
        (
            huggingface_hub.errors.OfflineModeIsEnabled("offline"),
            NmsparseError,
            "cannot be reached",
        ),
        (huggingface_hub.errors.HFValidationError("bad"), UsageError, "not a name"),
        (refused(403), NmsparseError, "does not let this token write"),
        (RuntimeError("odd\nmore"), NmsparseError, ": odd."),
    ],
)
def test_a_hub_that_refuses(monkeypatch, hub, native, error, kind, sentence):
    monkeypatch.setattr(FakeApi, "refuses", error)
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        nms.publish(native, "me/pico")
    assert "\n" not in caught.value.message and not hub.commits
    assert (native / "model/README.md").is_file()  # the card stays


def test_what_is_published_is_what_is_there(native):
    assert all(path.is_file() for path in published(native).values())
