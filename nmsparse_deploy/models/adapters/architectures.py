"""What the name of an architecture of Transformers tells: the class that loads it, its job, its
family."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.models.adapters import transformers_private

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
"""How an architecture's name ends -> what loads it with its head; anything else is loaded without
one."""
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}
"""How an architecture's name ends -> what a hub calls its job; for others the hub is told
nothing."""
GENERATES = "ForConditionalGeneration"
"""Loaded by its own class: several automatic ones claim this ending."""


def auto_class(config: Any) -> str:
    """Name the class of Transformers that loads a model of this config with its head."""
    import transformers

    architecture = (config.architectures or [""])[0]
    if architecture.endswith(GENERATES) and hasattr(transformers, architecture):
        return str(architecture)
    auto = next((name for end, name in HEADS.items() if architecture.endswith(end)), "AutoModel")
    known = transformers_private.takes(getattr(transformers, auto), config)
    return auto if known or not hasattr(transformers, architecture) else str(architecture)


def family(module: Any, auto: str) -> str:
    """`llm`, `encoder`, `seq2seq` or `vision`."""
    detects = module.main_input_name == "pixel_values" and vocabulary(module.config) is None
    if getattr(module.config, "is_encoder_decoder", False) and not detects:
        return "seq2seq"
    if module.main_input_name == "pixel_values":
        return "vision"
    return "llm" if auto == "AutoModelForCausalLM" or auto.endswith(GENERATES) else "encoder"


def vocabulary(config: Any) -> int | None:
    """Return how many tokens the text that a model reads has; None where it reads none."""
    return getattr(config.get_text_config(), "vocab_size", None)
