"""Prune a model, fine-tune it without losing its zeros, and check every group of what is saved.

    python examples/finetune.py MODEL --data train.txt --out runs/tuned

With PEFT installed, LoRA is trained and merged; otherwise all weights are. Without `keep_pattern`
(--forget) the fine-tuned model is dense, and the last check says so.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import nmsparse_deploy as nms
from nmsparse_deploy import models


def windows(tokenizer: PreTrainedTokenizerBase, file: Path, length: int) -> torch.Tensor:
    """Cut a text into rows of `length` tokens."""
    ids = torch.tensor(tokenizer(file.read_text(), verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def train(model: torch.nn.Module, rows: torch.Tensor, steps: int) -> None:
    """Train with any optimizer of torch, here a plain loop; a Trainer takes `callbacks=[keep]`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    for step in range(steps):
        batch = rows[torch.arange(4 * step, 4 * step + 4) % len(rows)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="hub name or folder")
    parser.add_argument("--data", type=Path, required=True, help="a text to train on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens per sample")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA")
    parser.add_argument("--forget", action="store_true", help="leave keep_pattern out")
    options = parser.parse_args()

    run = nms.prune(options.model, nms.Prune(method="magnitude"), options.out)
    loaded = models.load(str(run / "model"))
    model, rows = loaded.module, windows(loaded.processor, options.data, options.length)
    lora = find_spec("peft") is not None and not options.full
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    if not options.forget:
        nms.keep_pattern(model, run)
    train(model, rows, options.steps)
    if lora:
        model = model.merge_and_unload()

    tuned = options.out / "tuned"
    model.save_pretrained(tuned, save_original_format=False)  # under the names that masks have
    loaded.processor.save_pretrained(tuned)
    report = nms.verify_checkpoint(tuned, nms.MaskSet.load(run / "masks.safetensors"))
    print(f"{'LoRA' if lora else 'full'}: {report.checked} checked, {report.failed} failed")
    raise SystemExit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
