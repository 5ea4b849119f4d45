"""The language model of `learned_small.py`: Llama-shaped, 0.85 M prunable weights, trained here on
packaged text.

Articles of the Wikipedia sample are dealt out by number: a model learns from six tenths of them,
pruning from three, and one is for the score. Nobody but the score ever sees that one.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nmsparse_deploy.data.text import Text, load_text, windows
from nmsparse_deploy.find.learn.step_context import order, rate_factor

VOCABULARY, LENGTH = 1024, 128
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4 * LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
STEPS, BATCH, RATE, WARMUP = 1000, 16, 3e-3, 50
PARTS = {"train": (4, 5, 6, 7, 8, 9), "calibration": (1, 2, 3), "test": (0,)}
"""Last digits of the articles' numbers."""


def texts() -> dict[str, Text]:
    """The three parts of the packaged Wikipedia sample."""
    documents = load_text("wikipedia").documents
    return {
        name: Text(
            name, tuple(text for number, text in enumerate(documents) if number % 10 in digits)
        )
        for name, digits in PARTS.items()
    }


def tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with `VOCABULARY` entries, learned from `text`."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(text.documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def trained(folder: Path, steps: int = STEPS) -> Path:
    """The model's folder with the calibration text beside it; trained if it is not there yet."""
    if (folder / "training.json").is_file():
        return folder
    parts = texts()
    tokens = tokenizer(parts["train"])
    data = windows(parts["train"], tokens, LENGTH)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    start = time.perf_counter()
    loss = _train(model, data, steps)
    facts = {
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "distinct_tokens": data.numel(),
        "seconds": round(time.perf_counter() - start, 1),
        "last_loss": loss,
    }
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    tokens.save_pretrained(work)
    (work / "calibration.txt").write_text("\n\n".join(parts["calibration"].documents))
    (work / "training.json").write_text(json.dumps(facts))
    work.rename(folder)
    return folder


def _train(model: LlamaForCausalLM, data: torch.Tensor, steps: int) -> float:
    """AdamW along a cosine; returns the mean loss of the last tenth."""
    optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.1)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * rate_factor(
            step, steps, min(WARMUP, steps - 1), "cosine", 0.0
        )
        ids = data[order(0, len(data), step * BATCH, BATCH)]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"dense model: step {step + 1} of {steps}, loss {losses[-1]:.3f}", flush=True)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
