"""Text that the dense model writes itself: calibration data for who has none, and any amount of it
for distillation.

As in the data-free distillation of LLM-QAT (Liu et al. 2023, arXiv:2305.17888): any token of the
vocabulary begins a text, the next few are the likeliest ones, and the rest is drawn from the
model's own distribution.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nmsparse_deploy.data.text import TokenSample
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.masks import tensor_hash
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.system import hardware
from nmsparse_deploy.system.assets import cache_dir
from nmsparse_deploy.system.progress import Progress, silent

GENERATED = "generated"
"""The name of this source."""
CERTAIN = 4
"""Tokens after the first that are the likeliest and not drawn."""
ROWS = {"cpu": 64, "cuda": 512}
"""Texts that are written at a time, if they fit. What is written does not depend on it but for
rounding."""


def generated(
    loaded: LoadedModel,
    samples: int,
    length: int,
    seed: int,
    compute: torch.dtype,
    progress: Progress = silent,
) -> TokenSample:
    """Return `samples` texts of `length` tokens, the same for the same weights and seed; kept in
    the cache folder.

    Raises `UsageError` for a model that does not write text, or whose weights are not all in
    memory.
    """
    if samples < 1:
        raise UsageError("Zero calibration tokens were asked for; at least one sample is needed.")
    if loaded.family != "llm" or loaded.processor is None:
        raise UsageError(
            f"'{loaded.source}' writes no text, so it cannot be calibrated on its own.",
            "give data of its kind with --data",
        )
    if loaded.streamed:
        raise UsageError(
            "Writing text needs the whole model in memory, a token at a time.",
            "give a text with --data, or leave --max-memory out",
        )
    key = _key(loaded, samples, length, seed, compute)
    path = cache_dir() / GENERATED / f"{key}.safetensors"
    if path.is_file():
        ids = load_file(path)["ids"].long()
    else:
        ids = write(loaded, samples, length, seed, compute, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            save_file({"ids": ids.to(torch.int32)}, Path(work) / path.name)
            (Path(work) / path.name).replace(path)
    return TokenSample(
        ids, tuple(range(samples)), GENERATED, hashlib.sha256(ids.numpy()).hexdigest()[:16]
    )


@torch.no_grad()
def write(
    loaded: LoadedModel,
    samples: int,
    length: int,
    seed: int,
    compute: torch.dtype,
    progress: Progress = silent,
) -> torch.Tensor:
    """Write token ids `[samples, length]` int64, on the CPU. A model in another dtype than
    `compute` is copied."""
    device = hardware.device()
    module: Any = loaded.module
    if next(module.parameters()).dtype != compute:
        module = copy.deepcopy(module).to(device, compute)
    module.to(device)
    generator = torch.Generator().manual_seed(seed)
    words = _vocabulary(loaded)
    first = words[torch.randint(len(words), (samples,), generator=generator)]
    chance = torch.rand(samples, length - 1, generator=generator, dtype=torch.float64)
    texts: list[torch.Tensor] = []
    rows, done = ROWS[device.type], 0
    while done < samples:
        progress(f"writing {samples} x {length} tokens to calibrate on", done, samples)
        part = slice(done, done + rows)
        try:
            texts.append(_continued(module, first[part].to(device), chance[part].to(device)).cpu())
        except torch.OutOfMemoryError:
            if rows == 1:
                raise NmsparseError(
                    f"Not even one text of {length} tokens fits into the memory beside "
                    f"'{loaded.source}'.",
                    "a smaller --length, or a text with --data",
                ) from None
            rows //= 2
            continue
        done += rows
    return torch.cat(texts)


def _continued(module: Any, first: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Write ids `[rows, length]` that begin with `first`. Token `t + 1` is where the cumulative
    probability passes `chance[:, t]`, so a text depends on its own numbers and not on its
    neighbours in the batch.

    Not the library's `generate`: it adds sampling settings of the model's own, stops at the end of
    a text, and draws from the global generator.
    """
    ids, token, cache = [first], first[:, None], None
    for step in range(chance.shape[1]):
        output = module(input_ids=token, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float(), output.past_key_values
        if cache is None:
            raise UsageError(
                "A model without a cache of keys and values would take very long to write text.",
                "give a text with --data",
            )
        if not torch.isfinite(logits).all():
            raise NmsparseError(
                "The model's predictions contain NaN or Inf, so it cannot write text."
            )
        ids.append(logits.argmax(-1) if step < CERTAIN else sampled(logits, chance[:, step]))
        token = ids[-1][:, None]
    return torch.stack(ids, 1)


def sampled(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Draw one token for each row of `logits` `[rows, words]`, by inverting the distribution at
    `chance` `[rows]`."""
    reached = logits.double().softmax(-1).cumsum(-1)
    # The sum ends a rounding away from one, and a token of probability zero is never meant.
    return torch.searchsorted(reached, (chance * reached[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )


def _vocabulary(loaded: LoadedModel) -> torch.Tensor:
    """List the tokens that may begin a text: no special ones, and only those that the model has an
    embedding for."""
    module: Any = loaded.module
    count = min(len(loaded.processor), module.get_input_embeddings().num_embeddings)
    special = torch.tensor(sorted(set(loaded.processor.all_special_ids)), dtype=torch.long)
    words = torch.arange(count)
    return words[~torch.isin(words, special)]


def _key(loaded: LoadedModel, samples: int, length: int, seed: int, compute: torch.dtype) -> str:
    """Hash the weights, and what is asked of them."""
    digest = hashlib.sha256(f"{samples} {length} {seed} {compute}".encode())
    for name, parameter in loaded.module.named_parameters():
        digest.update(f"{name} {tensor_hash(parameter)}".encode())
    return digest.hexdigest()[:32]
