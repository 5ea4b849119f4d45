"""A pruned model that is fine-tuned keeps its zeros, fully trained or with LoRA; without it, not."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.pattern import TWO_FOUR
from tests.fixtures import pico

IDS = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pico.save(getattr(pico, request.param)(), folder / "model")
    return nms.prune(str(folder / "model"), nms.Prune(method="magnitude"), folder / "run")


@pytest.fixture
def model(run):
    return models.load(str(run / "model")).module


def train(model, steps=3, make=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)):
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    linear = "c_attn" if hasattr(model.config, "n_embd") else "q_proj"
    settings = {"target_modules": [linear], "init_lora_weights": False} | settings
    fan = {"fan_in_fan_out": True} if linear == "c_attn" else {}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **fan, **settings))


def verified(model, run, folder):
    model.save_pretrained(folder)
    return nms.verify_checkpoint(folder, MaskSet.load(run / "masks.safetensors"))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_full_training_keeps_the_zeros(make, kept, run, model, tmp_path):
    before = {name: value.clone() for name, value in model.named_parameters()}
    keep = nms.keep_pattern(model, run) if kept else None
    train(model, make=lambda parameters: make(parameters, lr=1e-2))
    report = verified(model, run, tmp_path)
    assert report.ok == kept
    if keep is not None:
        keep.remove()
        assert keep.zeroed == 0
        assert all(not torch.equal(value, before[n]) for n, value in model.named_parameters())


@pytest.mark.parametrize("kept", [True, False])
def test_merged_lora_keeps_the_zeros_and_loses_nothing(kept, run, model, tmp_path):
    wrapped = lora(model, lora_dropout=0.1)
    if kept:
        with nms.keep_pattern(wrapped, run):
            train(wrapped)
    else:
        train(wrapped)
    with torch.no_grad():
        trained = wrapped(input_ids=IDS).logits
        merged = wrapped.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, trained, atol=1e-4)
    assert verified(merged, run, tmp_path).ok == kept


def test_lora_trains_what_the_mask_keeps(run, model):
    plain = copy.deepcopy(model)
    wrapped = lora(model)
    nms.keep_pattern(wrapped, run)
    with torch.no_grad():
        layer = next(m for m in wrapped.modules() if hasattr(m, "lora_variant"))
        name = next(n for n, p in plain.named_parameters() if p.shape == layer.weight.shape)
        mask = MaskSet.load(run / "masks.safetensors").masks[name].unpack()
        x = torch.randn(3, layer.in_features)
        update = torch.where(mask, layer.get_delta_weight("default"), 0.0)
        weight = layer.weight + update
        weight = weight.T if layer.fan_in_fan_out else weight
        expected = torch.nn.functional.linear(x, weight, layer.base_layer.bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)
        layer.merge()
        assert torch.allclose(layer(x), expected, atol=1e-5)
        layer.unmerge()
        assert torch.allclose(layer.weight, plain.get_parameter(name), atol=1e-6)
        assert torch.allclose(copy.deepcopy(layer)(x), expected, atol=1e-5)


def trainer(model, keep, folder):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        str(folder), max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no",
        use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[keep]).train()


def test_it_is_a_callback_of_the_trainer(run, model, tmp_path):
    trainer(model, nms.keep_pattern(model, run / "masks.safetensors"), tmp_path / "trainer")
    assert verified(model, run, tmp_path / "saved").ok


def test_a_trainer_may_put_lora_into_the_model_later(run, model, tmp_path):
    keep = nms.keep_pattern(model, run)
    wrapped = lora(model)
    trainer(wrapped, keep, tmp_path / "trainer")
    assert verified(wrapped.merge_and_unload(), run, tmp_path / "saved").ok


def test_masks_prune_a_dense_model_and_say_how_much_that_changed(run, tmp_path):
    masks = MaskSet.load(run / "masks.safetensors")
    dense = models.load(run.manifest().recipe.model).module
    keep = nms.keep_pattern(dense, masks)
    assert keep.zeroed == sum(int((~mask.unpack()).sum()) for mask in masks.masks.values())
    assert verified(dense, run, tmp_path).ok


def test_minus_zero_is_written_over_and_packing_is_undone():
    layer = torch.nn.Linear(12, 5, bias=False)  # 60 values do not fill their last byte
    mask = project(torch.randn(5, 12), TWO_FOUR)
    weight = torch.where(mask, -0.0, layer.weight.detach())
    layer.weight.data = weight
    nms.keep_pattern(layer, MaskSet({"weight": Mask.pack(mask, 1, TWO_FOUR, "")}))
    assert not torch.signbit(layer.weight).any() and not layer.weight.any()


def test_a_wrapped_model_is_followed_and_nothing_is_left_of_one_that_is_gone():
    hooks = set(torch_optimizer._global_optimizer_post_hooks)
    layer = torch.nn.Linear(8, 4, bias=False)
    mask = project(layer.weight.detach().abs(), TWO_FOUR)
    masks = MaskSet({"weight": Mask.pack(mask, 1, TWO_FOUR, "")})
    nms.keep_pattern(torch.nn.DataParallel(torch.compile(layer)), masks)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert not layer.weight[~mask].any() and layer.weight.any()
    assert set(torch_optimizer._global_optimizer_post_hooks) - hooks
    del layer, optimizer
    gc.collect()
    assert not set(torch_optimizer._global_optimizer_post_hooks) - hooks


@pytest.mark.parametrize(
    "spoil,sentence",
    [
        (lambda m: torch.nn.Linear(4, 4), "no parameter 'model.layers.0"),
        (lambda m: pico.llama(hidden_size=32), "has shape"),
        (
            lambda m: lora(m, use_dora=True),
            "'model.layers.0.self_attn.q_proj' is pruned.*DoraLinear",
        ),
        (lambda m: ia3(m), "cannot be kept under a mask"),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(spoil, sentence, run, model):
    if "llama" not in str(run.path):
        pytest.skip("one model is enough")
    with pytest.raises(UsageError, match=sentence):
        nms.keep_pattern(spoil(model), run)


def ia3(model):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    return peft.get_peft_model(model, config)


def test_a_trainer_of_another_model_is_refused(run, model):
    keep = nms.keep_pattern(model, run)
    with pytest.raises(UsageError, match="another model"):
        keep.on_train_begin(None, None, None, model=copy.deepcopy(model))


def test_weights_that_are_divided_among_processes(run, model, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        fully_shard(model)
        nms.keep_pattern(model, run)
        train(model, 1)
        masks = MaskSet.load(run / "masks.safetensors").masks
        for name, mask in masks.items():
            weight = model.get_parameter(name).full_tensor()
            assert not weight[~mask.unpack()].any(), name
    finally:
        distributed.destroy_process_group()
