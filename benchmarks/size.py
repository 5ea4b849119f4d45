"""Checkpoints that are larger than the memory a run may take; writes results/size-cpu.json.

`python -m benchmarks.size --folder SCRATCH [--sizes 2 8] [--methods magnitude wanda] [--limit 3GB]`

Llama-shaped bf16 checkpoints of random weights are written in shards; the larger one has more
blocks of the same shape. Each is pruned in a process of its own under `--max-memory`, then once
more by a process that is killed with SIGKILL when half of the blocks are done and by another that
goes on from there: the files have to be the same bytes. The scratch folder needs three times the
size of the largest checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.files import write_json
from nmsparse_deploy.system import assets
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.memory import parse_size
from tests.fixtures import pico

RESULT = Path(__file__).parent.parent / "results/size-cpu.json"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
}
SAMPLES, LENGTH = 16, 512
BLOCKS_PER_SHARD = 4


def shapes(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of one block."""
    wide, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    narrow = wide * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    path = f"model.layers.{layer}."
    for name, rows in (("q", wide), ("k", narrow), ("v", narrow), ("o", wide)):
        yield f"{path}self_attn.{name}_proj.weight", (rows, wide)
    for name in ("gate", "up"):
        yield f"{path}mlp.{name}_proj.weight", (inner, wide)
    yield f"{path}mlp.down_proj.weight", (wide, inner)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield path + name + ".weight", (wide,)


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms of one, matrices as Llama starts with."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def generate(folder: Path, gigabytes: float) -> dict[str, int]:
    """Write a checkpoint of about this size, shard by shard; kept when it is there already."""
    from transformers import LlamaConfig

    block = 2 * sum(torch.Size(shape).numel() for _, shape in shapes(0))
    ends = 2 * 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    layers = round((gigabytes * 1e9 - ends) / block)
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        outside = [
            ("model.embed_tokens.weight", (SHAPE["vocab_size"], SHAPE["hidden_size"])),
            ("model.norm.weight", (SHAPE["hidden_size"],)),
            ("lm_head.weight", (SHAPE["vocab_size"], SHAPE["hidden_size"])),
        ]
        parts = [
            [
                shape
                for layer in range(start, min(start + BLOCKS_PER_SHARD, layers))
                for shape in shapes(layer)
            ]
            for start in range(0, layers, BLOCKS_PER_SHARD)
        ]
        table, size = {}, 0
        for number, part in enumerate([outside, *parts], 1):
            file = f"model-{number:05d}-of-{len(parts) + 1:05d}.safetensors"
            tensors = {name: values(shape, generator) for name, shape in part}
            save_file(tensors, folder / file, {"format": "pt"})
            table |= dict.fromkeys(tensors, file)
            size += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        ids = torch.randint(0, SHAPE["vocab_size"], (SAMPLES, LENGTH), generator=generator)
        save_file({"input_ids": ids}, folder.parent / "tokens.safetensors")
        pico.tokenizer().save_pretrained(folder)
        config = LlamaConfig(
            **SHAPE, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
        )
        config.save_pretrained(folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"bytes": stored, "blocks": layers, "block_bytes": block}


def prune(
    model: Path, method: str, limit: str, run: Path, kill_after: int | None = None
) -> dict[str, float]:
    """Prune in a process of its own; with `kill_after` it is killed once so many blocks are
    finished."""
    command = [
        sys.executable,
        "-m",
        "nmsparse_deploy",
        "--json",
        "prune",
        str(model),
        "--method",
        method,
        "--samples",
        str(SAMPLES),
        "--length",
        str(LENGTH),
        "--data",
        str(model.parent / "tokens.safetensors"),
        "--max-memory",
        limit,
        "--out",
        str(run),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    largest = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        largest = max(largest, resident(process.pid))
        if kill_after is not None and len(list(run.glob("blocks/*.safetensors"))) >= kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL) or (kill_after is None and code):
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    # The process resets its own mark to measure single layers, so ru_maxrss is that of the time
    # since.
    return {
        "seconds": time.perf_counter() - start,
        "sampled_bytes": max(largest, usage.ru_maxrss * 1024),
        "killed": code != 0,
    }


def resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def digest(run: Path) -> str:
    """Of the bytes of weights, index, config and masks."""
    total = hashlib.sha256()
    for file in sorted([*(run / "model").iterdir(), run / "masks.safetensors"]):
        total.update(file.name.encode())
        total.update(bytes.fromhex(assets.digest(file)))
    return total.hexdigest()


def measure(
    model: Path, facts: dict[str, int], method: str, limit: str, scratch: Path
) -> dict[str, object]:
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    whole = prune(model, method, limit, run)
    stage = json.loads((run / "manifest.json").read_text())["stages"]["prune"]
    report = json.loads((run / "verify.json").read_text())["reports"][0]
    peak = max(stage["memory"]["peak_bytes"], whole["sampled_bytes"])
    wanted = digest(run)
    shutil.rmtree(run)
    killed = prune(model, method, limit, run, facts["blocks"] // 2)
    blocks = len(list(run.glob("blocks/*.safetensors")))
    resumed = prune(model, method, limit, run)
    row = {
        **facts,
        "method": method,
        "limit_bytes": parse_size(limit),
        "peak_bytes": peak,
        "predicted_bytes": stage["memory"]["predicted_bytes"],
        "weights": stage["memory"]["weights"],
        "hidden_states": stage["memory"]["hidden_states"],
        "layers": stage["layers"],
        "verified": bool(report["ok"]),
        "seconds": round(whole["seconds"], 1),
        "seconds_per_gb": round(whole["seconds"] / (facts["bytes"] / 1e9), 1),
        "killed_after_blocks": blocks if killed["killed"] else None,
        "resumed_peak_bytes": resumed["sampled_bytes"],
        "resumed_is_identical": digest(run) == wanted,
    }
    shutil.rmtree(run)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2, 8])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda"])
    parser.add_argument("--limit", default="3GB")
    asked = parser.parse_args()
    old = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    for size in asked.sizes:
        model = asked.folder / f"{size:g}gb" / "model"
        facts = generate(model, size)
        for method in asked.methods:
            row = {"gigabytes": size, **measure(model, facts, method, asked.limit, model.parent)}
            print(json.dumps(row), flush=True)
            old = [one for one in old if (one["gigabytes"], one["method"]) != (size, method)] + [
                row
            ]
            result = {
                "command": "python -m benchmarks.size --folder SCRATCH",
                "date": now(),
                "settings": {
                    "shape": SHAPE,
                    "samples": SAMPLES,
                    "length": LENGTH,
                    "pattern": "2:4",
                },
                **environment(),
                "rows": sorted(old, key=lambda one: (one["method"], one["gigabytes"])),
            }
            write_json(RESULT, result)


if __name__ == "__main__":
    main()
