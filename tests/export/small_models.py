"""Two-block models of four families, built in code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from nmsparse_deploy.models.base import Target
from nmsparse_deploy.pattern import TWO_FOUR, project


@dataclass(frozen=True)
class Case:
    module: nn.Module
    targets: tuple[Target, ...]
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    """(batch, length) -> keyword arguments."""
    output: str

    def reference(self, inputs, dtype=torch.float32):
        with torch.no_grad():
            return getattr(self.module(**inputs), self.output).to(dtype)


def linear_targets(module: nn.Module, under: str = "") -> tuple[Target, ...]:
    found = []
    for path, child in module.named_modules():
        if not path.startswith(under):
            continue
        if isinstance(child, nn.Linear):
            found.append(Target(f"{path}.weight", path, 0, 1, child.in_features, child.out_features, path))
        elif type(child).__name__ == "Conv1D":
            found.append(Target(f"{path}.weight", path, 0, 0, *child.weight.shape, path))
    return tuple(found)


def bake(module: nn.Module, targets) -> None:
    """2:4 by magnitude, zeros written as +0.0."""
    parameters = dict(module.named_parameters())
    for target in targets:
        weight = parameters[target.name]
        mask = project(weight.detach().abs(), TWO_FOUR, target.axis)
        weight.data = torch.where(mask, weight.data, torch.zeros(()))


def tokens(batch, length):
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, vocab_size=128, tie_word_embeddings=True)
    return LlamaForCausalLM(config), "model.layers", "logits", lambda b, n: {"input_ids": tokens(b, n)}


def _bert():
    from transformers import BertConfig, BertModel

    def inputs(batch, length):
        attention = torch.ones(batch, length, dtype=torch.int64)
        attention[0, length // 2 :] = 0
        return {"input_ids": tokens(batch, length), "attention_mask": attention}

    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                        vocab_size=128)
    return BertModel(config), "encoder", "last_hidden_state", inputs


def _dinov2():
    from transformers import Dinov2Config, Dinov2Model

    def inputs(batch, length):
        return {"pixel_values": torch.randn(batch, 3, 56, 56, generator=torch.Generator().manual_seed(batch))}

    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=56,
                          patch_size=14)
    return Dinov2Model(config), "encoder", "last_hidden_state", inputs


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config), "transformer.h", "logits", lambda b, n: {"input_ids": tokens(b, n)}


FAMILIES = {"llama": _llama, "bert": _bert, "dinov2": _dinov2, "gpt2": _gpt2}


@lru_cache
def case(family: str) -> Case:
    torch.manual_seed(0)
    module, blocks, output, inputs = FAMILIES[family]()
    module.eval()
    targets = linear_targets(module, blocks)
    bake(module, targets)
    return Case(module, targets, inputs, output)
