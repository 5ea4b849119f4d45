"""Every family of the support table as a two-block model with random weights, saved the way its library saves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests import pico
from tests.baichuan import BaichuanConfig, BaichuanForCausalLM

PIXELS = 32
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": pico.VOCABULARY, "max_position_embeddings": 128}
ENDS = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
GROUPED = {**WIDE, **ENDS, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
PICTURES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": PIXELS, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """`build` saves a model into a folder; `data` is what it is calibrated on."""

    build: Callable[[Path], None]
    data: str = "text"
    """`text`, `pictures`, or `prepared`: a file `inputs.safetensors` that `build` writes beside the model."""


def _decoder(kind: str, tokenizer: str = "pico", **settings) -> Family:
    """A model of Transformers by the name of its configuration, with the byte tokenizer."""
    def build(folder: Path) -> None:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        module = transformers.AutoModelForCausalLM.from_config(config).eval()
        pico.save(module, folder)

    return Family(build)


def _class(name: str, config: str, data: str = "text", tokenizer: Callable | None = None, **settings) -> Family:
    """A model of Transformers by the name of its class."""
    def build(folder: Path) -> None:
        torch.manual_seed(0)
        module = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
        module.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer().save_pretrained(folder)

    return Family(build, data)


def _timm(name: str, **settings) -> Family:
    def build(folder: Path) -> None:
        import timm

        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False, num_classes=3, **settings).eval()
        timm.models.save_for_hf(module, str(folder), safe_serialization=True)

    return Family(build, "pictures")


def _denoiser(name: str, scheduler: str = "DDIMScheduler", text: int = 0, pooled: int = 0, **settings) -> Family:
    """A transformer of diffusers by the name of its class, with its scheduler; latents for those that read text."""
    def build(folder: Path) -> None:
        import diffusers

        torch.manual_seed(0)
        module = getattr(diffusers, name)(**settings).eval()
        module.save_pretrained(folder)
        getattr(diffusers, scheduler)().save_pretrained(folder / "scheduler")
        if not text:
            return
        generator = torch.Generator().manual_seed(1)
        shapes = {"encoder_hidden_states": (12, text), **({"pooled_projections": (pooled,)} if pooled else {})}
        size = settings["sample_size"]
        tensors = {"latents": torch.randn(8, settings["in_channels"], size, size, generator=generator)}
        for argument, shape in shapes.items():
            tensors[argument] = torch.randn(8, *shape, generator=generator)
            tensors[f"null.{argument}"] = torch.randn(*shape, generator=generator)
        save_file(tensors, folder / "inputs.safetensors")

    return Family(build, "prepared" if text else "pictures")


def _encoder_tokenizer():
    from tests.vision import small

    return small.tokenizer()


def _baichuan(folder: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoConfig.register("baichuan-like", BaichuanConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
    pico.save(BaichuanForCausalLM(BaichuanConfig(**WIDE, **ENDS)).eval(), folder)


def _whisper(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=pico.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=24,
        max_target_positions=64, bos_token_id=256, eos_token_id=256, pad_token_id=256, decoder_start_token_id=257,
        suppress_tokens=None, begin_suppress_tokens=None)
    transformers.WhisperForConditionalGeneration(config).eval().save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    save_file({"input_features": torch.randn(8, 16, 48, generator=generator),
               "decoder_input_ids": torch.randint(0, 256, (8, 12), generator=generator)}, folder / "inputs.safetensors")


SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 2, "img_size": PIXELS}
DENOISER = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 16, "patch_size": 2}
MMDIT = {**DENOISER, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 20,
         "caption_projection_dim": 32, "pos_embed_max_size": 16}
VIT = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": PIXELS, "patch_size": 8}

FAMILIES: dict[str, Family] = {
    "OPT": _decoder("OPT", **{**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, **ENDS}),
    "OPT-350M": _decoder("OPT", **{**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False,
                                   **ENDS}),
    "LLaMA": _decoder("Llama", **GROUPED),
    "LLaMA 3": _decoder("Llama", **GROUPED, tie_word_embeddings=True, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "Mistral": _decoder("Mistral", **GROUPED, sliding_window=8),
    "Qwen2": _decoder("Qwen2", **GROUPED),
    "Qwen3": _decoder("Qwen3", **GROUPED, head_dim=8),
    "Gemma 2": _decoder("Gemma2", **GROUPED, head_dim=8, sliding_window=8),
    "Gemma 3": _decoder("Gemma3Text", **GROUPED, head_dim=8, sliding_window=8,
                        layer_types=["sliding_attention", "full_attention"]),
    "Phi-3": _decoder("Phi3", **GROUPED),
    "GPT-2": _decoder("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=pico.VOCABULARY,
                      bos_token_id=256, eos_token_id=256),
    "GPT-NeoX": _decoder("GPTNeoX", **WIDE, **ENDS),
    "BLOOM": _decoder("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=pico.VOCABULARY, **ENDS),
    "Falcon": _decoder("Falcon", **{**WIDE, "ffn_hidden_size": 64, **ENDS}, new_decoder_architecture=True,
                       num_kv_heads=2),
    "Falcon (ALiBi)": _decoder("Falcon", **{**WIDE, "ffn_hidden_size": 64, **ENDS}, alibi=True, multi_query=False,
                               parallel_attn=False, bias=True),
    "Baichuan-style": Family(_baichuan),
    "Mixtral": _decoder("Mixtral", **EXPERTS),
    "Qwen2-MoE": _decoder("Qwen2Moe", **EXPERTS),
    "Qwen3-MoE": _decoder("Qwen3Moe", **EXPERTS, head_dim=8),
    "GPT-OSS": _decoder("GptOss", **EXPERTS, head_dim=8, sliding_window=8),
    "BERT": _class("BertModel", "BertConfig", tokenizer=_encoder_tokenizer, **WIDE),
    "T5": _class("T5ForConditionalGeneration", "T5Config", tokenizer=_encoder_tokenizer, vocab_size=pico.VOCABULARY,
                 d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "T5 (gated)": _class("T5ForConditionalGeneration", "T5Config", tokenizer=_encoder_tokenizer, d_model=32, d_kv=8,
                         vocab_size=pico.VOCABULARY, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
                         feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "Whisper": Family(_whisper, "prepared"),
    "ViT": _class("ViTForImageClassification", "ViTConfig", "pictures", **PICTURES),
    "DINOv2": _class("Dinov2Model", "Dinov2Config", "pictures", hidden_size=32, num_hidden_layers=2,
                     num_attention_heads=4, mlp_ratio=2, image_size=PIXELS, patch_size=8),
    "DeiT": _class("DeiTForImageClassification", "DeiTConfig", "pictures", **PICTURES),
    "BEiT": _class("BeitForImageClassification", "BeitConfig", "pictures", **PICTURES),
    "Swin": _class("SwinForImageClassification", "SwinConfig", "pictures", embed_dim=16, depths=[2, 2],
                   num_heads=[2, 4], image_size=PIXELS, patch_size=2, window_size=4),
    "ConvNeXt": _class("ConvNextForImageClassification", "ConvNextConfig", "pictures", hidden_sizes=[16, 32],
                       depths=[2, 2], num_stages=2),
    "ResNet": _class("ResNetForImageClassification", "ResNetConfig", "pictures", embedding_size=16, hidden_sizes=[16, 32],
                     depths=[2, 2], layer_type="basic"),
    "timm ViT": _timm("vit_tiny_patch16_224", **VIT),
    "timm DeiT": _timm("deit_tiny_distilled_patch16_224", **VIT),
    "timm BEiT": _timm("beit_base_patch16_224", **VIT),
    "timm EVA": _timm("eva02_tiny_patch14_224", **VIT),
    "timm Swin": _timm("swin_tiny_patch4_window7_224", **SWIN),
    "timm ConvNeXt": _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 16, 32)),
    "DiT": _denoiser("DiTTransformer2DModel", **DENOISER, in_channels=3, num_embeds_ada_norm=3),
    "PixArt": _denoiser("PixArtTransformer2DModel", text=24, **DENOISER, in_channels=4, out_channels=8,
                        cross_attention_dim=32, caption_channels=24),
    "SD3 (MMDiT)": _denoiser("SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler", text=24, pooled=20, **MMDIT),
    "SD3.5 (MMDiT-X)": _denoiser("SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler", text=24, pooled=20, **MMDIT,
                                 dual_attention_layers=(0,), qk_norm="rms_norm"),
}
