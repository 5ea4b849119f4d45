"""Perplexity of a language model on held-out text, and continuations of a few prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nmsparse_deploy.data.sequences import decoder_start, taught
from nmsparse_deploy.data.text import TokenSample
from nmsparse_deploy.measure.evaluate.result import (
    Continuation,
    EvalResult,
    Ratio,
    bootstrap_interval,
    mean_result,
)
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.system.progress import Progress, silent

PROMPTS = ("The capital of France is", "Three things you need to bake bread are")


@torch.no_grad()
def perplexity(
    module: nn.Module, sample: TokenSample, where: str, label: str = "", progress: Progress = silent
) -> EvalResult:
    """Measure token perplexity over non-overlapping windows; the first token of a window has no
    prediction.

    An encoder-decoder reads the first half of a window and is asked for the second. The standard
    error is that of the mean over windows, carried to the perplexity (delta method). Logits are
    reduced in fp32, whatever dtype the forward pass runs in.
    """
    device = next(module.parameters()).device
    losses = []
    for number, row in enumerate(sample.ids):
        progress(f"perplexity {label}", number, len(sample.ids))
        logits, wanted = _predicted(module, row.unsqueeze(0).to(device))
        losses.append(
            sum(
                float(nn.functional.cross_entropy(part.float(), target, reduction="sum"))
                for part, target in zip(logits.split(256), wanted.split(256))
            )
            / len(wanted)
        )
    progress(f"perplexity {label}", len(losses), len(losses))
    context = sample.ids.shape[1]
    protocol = {
        "data": sample.source,
        "data_fingerprint": sample.fingerprint,
        "windows": list(sample.windows),
        "context": context,
        "stride": context,
        "bos": False,
        "tokens": sample.ids.numel(),
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
    metric = (
        f"conditional_ppl@{context - context // 2}"
        if _two_sided(module)
        else f"token_ppl@{context}"
    )
    loss = mean_result(metric, losses, where, protocol)
    return replace(
        loss, value=_exp(loss.value), standard_error=_exp(loss.value) * loss.standard_error
    )


def _two_sided(module: nn.Module) -> bool:
    return bool(getattr(module.config, "is_encoder_decoder", False))


def _predicted(module: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits `[tokens, vocabulary]` of one window `[1, length]`, and the tokens that they
    should foretell."""
    if not _two_sided(module):
        return module(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]
    read, asked = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]
    given = taught(asked, decoder_start(module.config))
    return module(input_ids=read, decoder_input_ids=given, use_cache=False).logits[0], asked[0]


def paired_ratio(dense: EvalResult, pruned: EvalResult, seed: int = 0) -> Ratio:
    """Return pruned over dense perplexity on the same windows, with a 95 % bootstrap interval over
    windows."""
    difference = torch.tensor(
        [b - a for a, b in zip(dense.per_sample, pruned.per_sample)], dtype=torch.float64
    )
    low, high = bootstrap_interval(difference, seed)
    return Ratio(_exp(float(difference.mean())), _exp(low), _exp(high))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@torch.no_grad()
def continuations(
    model: LoadedModel, tokens: int, prompts: tuple[str, ...] = PROMPTS
) -> list[Continuation]:
    """Write greedy continuations of a few prompts: what the numbers look like to a reader."""
    rows = []
    device = next(model.module.parameters()).device
    for prompt in prompts:
        inputs = model.processor(prompt, return_tensors="pt").to(device)
        generate: Any = model.module.generate
        output = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.processor.eos_token_id,
        )
        text = model.processor.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rows.append(Continuation(prompt, text))
    return rows
