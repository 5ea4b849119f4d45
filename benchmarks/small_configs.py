"""A small model of every architecture that Transformers knows, from its default configuration.

What a configuration relates has to stay related, so nothing is set: widths, head sizes and head
counts are divided by factors that fit together, layers are cut to one of each kind (two at least),
vocabularies and token ids are squeezed. What does not build with the first factors is tried with
milder ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

VOCABULARY = 320
LAYERS = 2
EXPERTS = 4
LARGEST = 60e6
"""Parameters; what is larger even when shrunk is not built."""
FACTORS = ((4, 4), (8, 4), (4, 1), (2, 1), (1, 1))
"""(head sizes, head counts); widths are divided by the product."""
DROPPED = ("stage_names", "out_features", "out_indices", "per_layer_config")
"""Derived from layer counts, unless they are given."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "zamba2": {"hybrid_layer_ids": [1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "reformer": {"is_decoder": True},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
"""What the default configuration leaves open, or says of layers that are cut."""

HEADS = re.compile(
    r"(^|_)(n_heads?|heads|num_heads|attention_heads|num_attention_heads|num_key_value_heads|"
    r"kv_heads|num_kv_heads|mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads)$"
)
HEAD_SIZES = re.compile(
    r"(^|_)(head_dim|\w*headdim|d_head|d_kv|dim_head|kv_channels|rotary_dim|mrope_section|head_size|"
    r"axes_dims?)$"
)
WIDTHS = re.compile(
    r"(^|_)(hidden_sizes?|intermediate_sizes?|d_model|n_embd|n_inner|d_ff|d_inner|ffn_dim|"
    r"ffn_hidden_size|dim|dims|embed_dims?|embedding_size|embedding_dim|mlp_dim|hidden_dims?|"
    r"hidden_channels|channels|lora_rank|rank|proj_dim|projection_dim|inner_dim|feedforward_dim|"
    r"dim_feedforward|output_channels|output_dim|lru_width|units|hidden_size_per_layer_input|"
    r"projection_size|filters|width)$"
)
KEPT = re.compile(
    r"num_channels|image_channels|in_chan|audio_channels|^input_channels|codebook_dim|mel"
)
LAYER_COUNTS = re.compile(r"(^|_)(num_(\w+_)?layers|n_layers?|layers|depth|num_blocks)$")
KINDS = re.compile(r"(layer_types|layers_block_type|block_types|indexer_types|no_rope_layers)$")
EXPERT_COUNTS = re.compile(r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)$")
CHOSEN = re.compile(
    r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts)$"
)
GROUPS = re.compile(r"(n_group|topk_group|num_expert_group|num_limited_groups)$")
TOKENS = re.compile(r"(_token_id|_token_index|_token_ids)$")


def build(model_class: Any, config_class: Any) -> nn.Module:
    """Make the first small model that builds; raise what the last attempt raised."""
    failure: Exception = ValueError("no configuration")
    for factors in FACTORS:
        try:
            small = shrink(config_class().to_dict(), *factors)
            config = config_class.from_dict(small | SETTINGS.get(config_class.model_type, {}))
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} M parameters even when shrunk")
            torch.manual_seed(0)
            return model_class(config).eval()
        except Exception as error:
            failure = error
    raise failure


def shrink(config: dict[Any, Any], head_sizes: int, heads: int) -> dict[str, Any]:
    """Return the entries of a configuration, divided; nested ones too."""
    ids: dict[int, int] = {}

    def token(value: Any) -> Any:
        if isinstance(value, list):
            return [token(item) for item in value]
        if not isinstance(value, int) or value < VOCABULARY - 64:
            return value
        return ids.setdefault(value, VOCABULARY - 1 - len(ids) % 64)

    def part(entries: dict[Any, Any]) -> dict[str, Any]:
        listed = _layers(entries)
        small = {
            key: entry(str(key), value)
            for key, value in (entries | listed).items()
            if key not in DROPPED and value is not None
        }
        return small | {key: value for key, value in listed.items() if isinstance(value, int)}

    def entry(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return part(value)
        if isinstance(value, (bool, str, float)) or KEPT.search(key):
            return value
        if TOKENS.search(key):
            return token(value)
        if "vocab" in key:
            return min(value, VOCABULARY) if isinstance(value, int) else value
        for names, most in ((EXPERT_COUNTS, EXPERTS), (CHOSEN, 2), (GROUPS, 1)):
            if names.search(key):
                return [most] * len(value) if isinstance(value, list) else min(value, most)
        if _counts_layers(key) and isinstance(value, int):
            return min(value, LAYERS)
        if key == "depths" or key.endswith("blocks_per_stage"):
            return [min(depth, LAYERS) for depth in value] if isinstance(value, list) else value
        factors = ((HEADS, heads), (HEAD_SIZES, head_sizes), (WIDTHS, heads * head_sizes))
        return next((_divided(value, by) for names, by in factors if names.search(key)), value)

    return part(config)


def _divided(value: Any, factor: int) -> Any:
    if isinstance(value, list):
        return [_divided(item, factor) for item in value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        return value
    return max(value // factor, 1)


def _counts_layers(key: str) -> bool:
    return bool(LAYER_COUNTS.search(key)) and "feat_extract" not in key


def _layers(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Keep one layer of each kind, where a configuration lists the kinds; any list with an entry
    per layer counts."""
    counts = [key for key in entries if _counts_layers(str(key))]
    count = entries.get("num_hidden_layers") or next((entries[key] for key in counts), None)
    if not isinstance(count, int) or count <= LAYERS:
        return {}
    lists = {
        key: value
        for key, value in entries.items()
        if isinstance(value, list) and len(value) == count and not TOKENS.search(str(key))
    }
    kinds = [key for key in lists if KINDS.search(str(key))]
    first = {tuple(str(lists[key][layer]) for key in kinds): layer for layer in range(count)[::-1]}
    kept = sorted(first.values())
    more = [layer for layer in range(count) if layer not in kept]
    kept = sorted((kept + more)[: max(LAYERS, len(kept))])
    lengths = {key: len(kept) for key in counts if entries[key] == count}
    return {**{key: [lists[key][layer] for layer in kept] for key in lists}, **lengths}
