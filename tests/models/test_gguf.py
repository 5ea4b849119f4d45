"""GGUF in, safetensors out: a two-block file written here comes back as a folder that the stock
library loads."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.recipe import Prune
from tests.fixtures import pico

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def stored_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows in which GGUF keeps rotary queries and keys: the two halves of a head
    alternate."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path, module) -> None:
    config, writer = module.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    table = pico.tokenizer().get_vocab()
    tokens = [*sorted(table, key=table.get), "ab", "cd"]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * 256
        + [gguf.TokenType.CONTROL]
        + [gguf.TokenType.NORMAL] * (len(tokens) - 257)
    )
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)  # transformers 5.17 wants one
    writer.add_eos_token_id(256)
    for name, value in module.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        writer.add_tensor(
            stored_name(name), (interleaved(value, heads) if heads else value).contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "pico.gguf", pico.llama())
    return tmp_path / "pico.gguf"


def test_gguf_in_safetensors_out(file, tmp_path):
    run = prune(str(file), Prune(method="magnitude"), tmp_path / "run")
    assert (run / "model/model.safetensors").is_file() and not list((run / "model").glob("*.gguf"))
    config = json.loads((run / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    module = AutoModelForCausalLM.from_pretrained(run / "model")
    masks = MaskSet.load(run / "masks.safetensors").masks
    assert len(masks) == 14
    for name, value in pico.llama().state_dict().items():
        kept = value * masks[name].unpack() if name in masks else value
        assert torch.equal(module.state_dict()[name], kept), name
    again = AutoTokenizer.from_pretrained(run / "model")
    assert again("plain text")["input_ids"][-10:] == pico.tokenizer()("plain text")["input_ids"]
