"""Two more parts of the proof: what a step of learning a mask costs, and the tests that need a CUDA
device.

A masked step stands beside a step of ordinary training: the same model, the same 32 x 1024 tokens.
Both run in bf16 autocast on fp32 masters with AdamW, one micro-batch at a time. The masked step
trains six logits a group on frozen weights, with the dense model as its teacher where that is asked
for; the plain one trains the weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from nmsparse_deploy.measure.proof import parts

ROOT = Path(__file__).parents[2]

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
"""SmolLM2-135M."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def learning(setting: parts.PartRun) -> None:
    """Time and peak memory of a plain, a masked and a masked step with distillation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    samples, length, part = (4, 16, 2) if setting.dry else (32, 1024, 4)
    shape = TINY if setting.dry else SMOL
    done: dict[str, Any] = {
        "model": "two tiny blocks" if setting.dry else "SmolLM2-135M (random weights)",
        "tokens_per_step": samples * length,
        "micro_batch": part,
        "steps": {},
    }
    for name, distill in (("plain", None), ("masked", 0.0), ("masked, distilled", 1.0)):
        torch.manual_seed(0)
        with setting.machine.device:
            module = LlamaForCausalLM(
                LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)
            )
        ids = torch.randint(0, shape["vocab_size"], (samples, length)).to(setting.machine.device)
        batches = list(ids.split(part))
        step = (
            plain_step(module, batches)
            if distill is None
            else masked_step(module, batches, distill)
        )
        done["steps"][name] = _measure(step, setting)
        plain = done["steps"]["plain"]
        done["steps"][name]["over_plain"] = done["steps"][name]["median_ms"] / plain["median_ms"]
        setting.save(done)
        del module, step
        if setting.machine.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(step: Any, setting: Any) -> dict[str, Any]:
    import torch

    from nmsparse_deploy.system.timing import interleave, summarise, wall

    def whole() -> None:
        step()
        setting.machine.synchronise()

    if setting.machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = interleave(
        {"step": whole}, 3 if setting.dry else 7, warmup=1 if setting.dry else 2, clock=wall
    )["step"]
    arm = summarise("step", "", times)
    peak = torch.cuda.max_memory_allocated() if setting.machine.device.type == "cuda" else None
    return {
        "median_ms": arm.median_ms,
        "p10_ms": arm.p10_ms,
        "p90_ms": arm.p90_ms,
        "steps": arm.calls,
        "peak_bytes": peak,
    }


def plain_step(module: Any, batches: list[Any]) -> Any:
    """Train every weight with AdamW."""
    import torch

    from nmsparse_deploy.find.learn.losses import next_token

    optimiser = torch.optim.AdamW(module.parameters(), 1e-4)

    def step() -> None:
        for ids in batches:
            with torch.autocast(ids.device.type, torch.bfloat16):
                logits = module(input_ids=ids, use_cache=False).logits
            (next_token(logits, ids) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def masked_step(module: Any, batches: list[Any], distill: float) -> Any:
    """Train the logits of a MaskLLM mask on every block GEMM, as the loop of the package does."""
    import torch

    from nmsparse_deploy.find.learn.mask_parametrization import MaskSite
    from nmsparse_deploy.find.learn.step_context import StepContext
    from nmsparse_deploy.find.learn.subjects import BatchSubject
    from nmsparse_deploy.masks import project
    from nmsparse_deploy.models.base import to_rows
    from nmsparse_deploy.models.discovery import discover
    from nmsparse_deploy.models.objective import Objective
    from nmsparse_deploy.pattern import TWO_FOUR
    from nmsparse_deploy.recipe import MaskLLM
    from nmsparse_deploy.registry import LEARNERS

    spec = MaskLLM(steps=100, distill=distill).settled("global")
    targets = discover(module, {"input_ids": batches[0][:2, :16]}).targets
    sites = {one.name: MaskSite(one.name, one.name, one.axis, TWO_FOUR) for one in targets}
    priors = {
        one.name: project(
            to_rows(module.get_parameter(one.name).detach(), one.axis).abs(), TWO_FOUR
        )
        for one in targets
    }
    subject = BatchSubject(
        module,
        sites,
        [{"input_ids": ids, "use_cache": False} for ids in batches] * 2,
        Objective("cross-entropy"),
        spec,
        torch.bfloat16,
    )
    learner = LEARNERS.load("maskllm").make(spec)
    optimiser = learner.prepare(subject, priors)
    values = [value for group in optimiser.param_groups for value in group["params"]]

    def step() -> None:
        context = StepContext()
        for part in range(len(batches)):
            context = StepContext(0, 10, spec.steps, part, len(batches))
            terms = learner.loss_terms(subject, part, context)
            (torch.stack([term.float() for term in terms.values()]).sum() / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(values, spec.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            learner.after_step(context)

    return step


def tests(setting: parts.PartRun) -> None:
    """Run the tests that need a CUDA device."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *(["--collect-only"] if setting.dry else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr[-300:]
    setting.save(
        {
            "code": done.returncode,
            "summary": summary,
            "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        }
    )
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}: {summary}")


if __name__ == "__main__":
    parts.main({"learning": learning, "tests": tests})
