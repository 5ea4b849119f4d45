"""Adapters of PEFT as MODEL: merged into their base, or refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, UsageError
from tests.fixtures import pico
from tests.fixtures.hub import hub
from tests.models.test_hub import typed

peft = pytest.importorskip("peft")


def adapter(model, base, folder, kind="lora", **settings):
    """Save an adapter for `model`, which lies in `base`, with weights that change it."""
    configs = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "prompt": peft.PromptTuningConfig}
    wrapped = peft.get_peft_model(model, configs[kind](**settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "hada" in name:
            parameter.data = torch.randn_like(parameter) / 8
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(tmp_path):
    """A llama in bf16, and an adapter of its queries and gates."""
    base = pico.save(pico.llama().to(torch.bfloat16), tmp_path / "base")
    return adapter(
        pico.llama().to(torch.bfloat16),
        base,
        tmp_path / "adapter",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "gate_proj"],
    )


def test_an_adapter_is_added_in_fp32_and_rounded_once(tuned):
    loaded = models.load(str(tuned))
    assert type(loaded.module).__name__ == "LlamaForCausalLM" and loaded.name == "adapter"
    dense = pico.llama().to(torch.bfloat16).state_dict()
    stored = load_file(tuned / "adapter_model.safetensors")
    state, changed = loaded.module.state_dict(), 0
    assert state.keys() == dense.keys()
    for name, weight in dense.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in stored:
            delta = 2 * stored[key.format("B")].float() @ stored[key.format("A")].float()
            weight, changed = (weight.float() + delta).to(torch.bfloat16), changed + 1
        assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], weight), name
    assert changed == 4 and all(p.requires_grad for p in loaded.module.parameters())


def test_it_is_pruned_and_verified_like_any_model(tuned, texts, tmp_path):
    calibration = nms.Calibration(data=str(texts["calibration"]), samples=4, length=32)
    run = nms.prune(str(tuned), nms.Prune(method="wanda", calibration=calibration), tmp_path / "r")
    assert all(report.ok for report in nms.verify(run))
    facts = json.loads((run.path / "manifest.json").read_text())["stages"]["prune"]["provenance"]
    assert facts["adapter"] == "LORA" and facts["adapter_base"] == str(tuned.parent / "base")
    assert len(facts["adapter_sha256"]) == 64
    assert not (run.path / "model/adapter_config.json").exists()
    assert models.load(str(run.path / "model")).module.dtype == torch.bfloat16


def test_the_base_may_lie_beside_it_and_the_tokenizer_is_its_own(tuned, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    edit(tuned, base_model_name_or_path="../base")
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tuned)
    assert models.load(str(tuned)).processor.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "build,kind,settings",
    [
        (pico.gpt2, "lora", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (pico.llama, "lora", {"target_modules": ["q_proj"], "use_dora": True}),
        (pico.llama, "lora", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        (pico.llama, "loha", {"target_modules": ["o_proj"]}),
    ],
)
def test_kinds_of_adapters_compute_the_same_once_merged(build, kind, settings, tmp_path):
    base = pico.save(build(), tmp_path / "base")
    folder = adapter(build(), base, tmp_path / "adapter", kind, **settings)
    ids = torch.arange(24).view(2, 12)
    unmerged = peft.PeftModel.from_pretrained(build(), str(folder))
    loaded = models.load(str(folder)).module
    with torch.no_grad():
        expected, dense = unmerged(input_ids=ids).logits, build()(input_ids=ids).logits
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-4)
    assert not torch.allclose(expected, dense, atol=1e-3)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def lacks_a_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")


def of_another_model(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), str(folder / "adapter_model.bin"))
    (folder / "adapter_model.safetensors").unlink()


def a_model_beside(folder):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder.parent / "base" / file, folder)


def on_an_adapter(folder):
    shutil.copytree(folder, folder.parent / "second")
    edit(folder, base_model_name_or_path=str(folder.parent / "second"))


WRONG = [
    (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged"),
    (lambda f: edit(f, peft_type=None), "not one of PEFT"),
    (lambda f: edit(f, peft_type="NEWEST"), "cannot merge it: 'NEWEST'"),
    (lambda f: edit(f, base_model_name_or_path=None), "does not name the model"),
    (lambda f: edit(f, base_model_name_or_path="/no/where"), "its base is not to be had: .*/no/w"),
    (lambda f: edit(f, base_model_name_or_path="a/b"), "its base is not to be had: .*'a/b'"),
    (lambda f: edit(f, base_model_name_or_path="a/b", revision="v2"), "at the revision 'v2'"),
    (lambda f: edit(f, r=2), "cannot merge it: size mismatch"),
    (lambda f: edit(f, target_modules=["nothing"]), "cannot merge it: Target modules"),
    (lacks_a_tensor, "is not in its adapter_model"),
    (of_another_model, "LlamaForCausalLM there has no place for its 'score.weight'"),
    (pickled, r"adapter \(LORA\) for '.*base' whose weights are pickled"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "its weights are not there"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 9), "damaged or truncated"),
    (a_model_beside, "a model and a PEFT adapter beside it"),
    (on_an_adapter, "which is an adapter itself"),
]


@pytest.mark.parametrize("spoil,sentence", WRONG)
def test_what_cannot_be_merged_is_one_sentence(spoil, sentence, tuned):
    spoil(tuned)
    with pytest.raises(NmsparseError, match=sentence) as caught:
        models.load(str(tuned))
    assert "\n" not in caught.value.message


def test_its_shapes_are_those_of_its_base(tuned):
    assert models.shapes(str(tuned)).module.config.hidden_size == 64


def test_prompts_cannot_be_merged(tmp_path):
    base = pico.save(pico.llama(), tmp_path / "base")
    settings = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    folder = adapter(pico.llama(), base, tmp_path / "adapter", "prompt", **settings)
    with pytest.raises(UsageError, match=r"\(PROMPT_TUNING\).*nothing to merge"):
        models.load(str(folder))


def test_without_peft_it_says_what_it_is_and_how_to_merge(tuned, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        NmsparseError, match=r"PEFT adapter \(LORA\) for '.*base'.*'peft'"
    ) as caught:
        models.load(str(tuned))
    assert "nmsparse-deploy[peft]" in caught.value.hint and "merge_and_unload" in caught.value.hint


def test_it_is_not_streamed(tuned):
    assert models.checkpoint(str(tuned)) is None
    with pytest.raises(UsageError, match="cannot be streamed"):
        models.load(str(tuned), stream=True)


def test_an_adapter_of_a_hub_is_merged_into_a_base_of_the_hub(tuned, tmp_path):
    edit(tuned, base_model_name_or_path="a/base")
    with hub({"a/base": tuned.parent / "base", "a/lora": tuned}) as (address, _):
        out = tmp_path / "run"
        for _ in range(2):
            done = typed(address, tmp_path / "home", "prune", "a/lora", "--method", "magnitude",
                         "--out", str(out), "--force")  # fmt: skip
            assert done.returncode == 0, done.stderr
    facts = json.loads((out / "manifest.json").read_text())["stages"]["prune"]["provenance"]
    assert facts["adapter_base"] == "a/base" and facts["revision"]


@pytest.mark.parametrize("changed", ["adapter_model.safetensors", "adapter_config.json", "base"])
def test_a_run_is_bound_to_the_adapter_and_to_its_base(changed, tuned, tmp_path):
    base = tuned.parent / "base"
    (base / "NOTICE").write_text("of the base")
    spec = nms.Prune(method="magnitude")
    run = nms.prune(str(tuned), spec, tmp_path / "r")
    assert (run.path / "model/NOTICE").read_text() == "of the base"
    if changed == "base":
        pico.llama(seed=3).to(torch.bfloat16).save_pretrained(base)
        changed = f"{base}/model.safetensors"
    else:
        (tuned / changed).write_bytes((tuned / changed).read_bytes() + b" ")
    with pytest.raises(UsageError, match=re.escape(f"'{changed}'")):
        nms.prune(str(tuned), spec, tmp_path / "r")
