"""A decoder like Baichuan: query, key and value are one matrix `W_pack`, outside the library. Its code is local."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class BaichuanConfig(LlamaConfig):
    model_type = "baichuan-like"


class Attention(nn.Module):
    """Causal attention with ALiBi's slopes instead of positions."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        packed = self.W_pack(hidden).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(packed[0], packed[1], packed[2], mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, width))


class DecoderLayer(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask)
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class BaichuanForCausalLM(PreTrainedModel):
    config_class = BaichuanConfig
    main_input_name = "input_ids"

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        place = torch.arange(input_ids.shape[1], device=x.device)
        distance = place[None, :] - place[:, None]
        slopes = 2.0 ** -torch.arange(1, self.config.num_attention_heads + 1, device=x.device)
        mask = (slopes[:, None, None] * distance).masked_fill(distance > 0, float("-inf")).to(x.dtype)
        for layer in self.layers:
            x = layer(hidden_states=x, attention_mask=mask)[0]
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
