"""What a MaskLLM step costs beside the plain dense step, as ratios of paired timings in one run.

`python benchmarks/learned_cost.py` writes results/learned-cost-cpu.json (4 x 512 tokens), or
-cuda.json (32 x 1024) where there is a GPU. Both arms take the same batch through the same blocks
of the demo model's shape with random weights: forward, next-token loss, backward, clipping, AdamW.
The dense arm trains the block matrices themselves, the others train what stands for their masks. No
teacher, no judgement. Memory is what the learner holds for every prunable weight right after a
step: values, gradients and optimiser state, once counted from its tensors and once as the growth of
the process (or of the GPU's allocations); the prediction is that of `methods/maskllm.py` without
the best mask.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from files import write_json
from transformers import LlamaConfig, LlamaForCausalLM

from nmsparse_deploy.find.learn.learner import MASK_BYTES
from nmsparse_deploy.find.learn.mask_parametrization import MaskSite, detach
from nmsparse_deploy.find.learn.step_context import StepContext
from nmsparse_deploy.find.learn.subjects import BatchSubject
from nmsparse_deploy.find.methods.maskllm import LEARNED, bytes_per_weight
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.masks import project
from nmsparse_deploy.measure.bench import interleave, ratio, summarise
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.models.objective import Objective
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate
from nmsparse_deploy.system.environment import environment, now
from nmsparse_deploy.system.hardware import compute_dtype
from nmsparse_deploy.system.memory import give_back, used_memory

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
SIZES = {
    "cpu": {"samples": 4, "length": 512, "num_hidden_layers": 4, "vocab_size": 2048},
    "cuda": {"samples": 32, "length": 1024, "num_hidden_layers": 30, "vocab_size": 49152},
}
FORMS = ("candidates", "compact", "scores")
STEPS = 2000
BARS = {"cpu": 2.0, "cuda": 1.35}


class Arm:
    """One optimiser step of some trained values on a subject of its own."""

    def __init__(
        self, subject: BatchSubject, learner: Any, optimiser: torch.optim.Optimizer
    ) -> None:
        self.subject, self.learner, self.optimiser, self.step = subject, learner, optimiser, 0
        self.trained = [value for group in optimiser.param_groups for value in group["params"]]

    def __call__(self) -> None:
        context = StepContext(0, self.step % STEPS, STEPS)
        terms = (
            self.learner.loss_terms(self.subject, 0, context)
            if self.learner
            else self.subject.loss_terms(0, context)
        )
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def bytes_held(self) -> int:
        state = [value for one in self.optimiser.state.values() for value in one.values()]
        held = [*self.trained, *(value.grad for value in self.trained), *state]
        return sum(
            value.numel() * value.itemsize for value in held if isinstance(value, torch.Tensor)
        )


def subject(
    module: LlamaForCausalLM, size: dict[str, int], compute: torch.dtype, form: str
) -> BatchSubject:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size["vocab_size"], (size["samples"], size["length"]), generator=generator)
    batch = {"input_ids": ids.to(module.device), "use_cache": False}
    found = make_plan(discover(module, {"input_ids": batch["input_ids"][:2, :8]}), TWO_FOUR)
    sites = {
        row.target.name: MaskSite(row.target.name, row.target.name, row.target.axis, TWO_FOUR)
        for row in found.pruned()
    }
    learn = {"objective": "global", "form": form, "distill": 0.0, "steps": STEPS}
    spec = validate(Prune, {"method": "maskllm", "learn": learn}).learn.settled("global")
    return BatchSubject(module, sites, [batch, batch], Objective("cross-entropy"), spec, compute)


def dense_arm(module: LlamaForCausalLM, size: dict[str, int], compute: torch.dtype) -> Arm:
    own = subject(copy.deepcopy(module), size, compute, "auto")
    own.module.requires_grad_(False)
    weights = [own.module.get_parameter(name).requires_grad_(True) for name in own.sites]
    return Arm(
        own, None, torch.optim.AdamW(weights, 1e-6, (0.9, 0.95), weight_decay=0.0, fused=True)
    )


def masked_arm(
    module: LlamaForCausalLM, size: dict[str, int], compute: torch.dtype, form: str
) -> Arm:
    own = subject(module, size, compute, form)
    priors = {
        site.name: project(module.get_parameter(path).detach().abs(), TWO_FOUR)
        for path, site in own.sites.items()
    }
    learner = LEARNED.make(own.spec)
    return Arm(own, learner, learner.prepare(own, priors))


def held_now() -> int:
    """Bytes that this process holds on the device; what it has freed is handed back first."""
    give_back()
    return used_memory()


def measure(
    size: dict[str, int], device: str, compute: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    shape = {key: value for key, value in size.items() if key not in ("samples", "length")}
    module = LlamaForCausalLM(LlamaConfig(**SHAPE, **shape)).to(device).eval()
    dense = dense_arm(module, size, compute)
    weights = sum(value.numel() for value in dense.trained)
    rows = []
    for form in FORMS:
        masked = masked_arm(
            module, size, compute, form
        )  # the model is there already; what it adds is the learner's
        before = held_now() - sum(value.numel() * value.itemsize for value in masked.trained)
        masked()
        grown = held_now() - before
        times = interleave({"dense": dense, "masked": masked}, rounds)
        steps = {
            name: summarise(name, str(compute).removeprefix("torch."), found)
            for name, found in times.items()
        }
        cost = ratio(times["masked"], times["dense"])  # how many dense steps a masked one takes
        predicted = bytes_per_weight(masked.subject.spec, TWO_FOUR) - MASK_BYTES
        rows.append(
            {
                "form": form,
                "compute": str(compute).removeprefix("torch."),
                "prunable_weights": weights,
                "ratio": cost.speedup,
                "low": cost.low,
                "high": cost.high,
                "dense_ms": steps["dense"].median_ms,
                "masked_ms": steps["masked"].median_ms,
                "rounds": rounds,
                "extra_ns_per_weight": 1e6
                * (steps["masked"].median_ms - steps["dense"].median_ms)
                / weights,
                "bytes_per_weight": masked.bytes_held() / weights,
                "grown_bytes_per_weight": grown / weights,
                "predicted_bytes_per_weight": predicted,
            }
        )
        detach(module)
        del masked
        print(
            f"{form}, {rows[-1]['compute']}: {cost.speedup:.2f} dense steps ({cost.low:.2f} to "
            f"{cost.high:.2f}), {rows[-1]['bytes_per_weight']:.1f} bytes per weight",
            flush=True,
        )
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / f"results/learned-cost-{device}.json")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=SIZES[device]["num_hidden_layers"])
    options = parser.parse_args()
    size = {**SIZES[device], "num_hidden_layers": options.layers}
    dtypes = list(dict.fromkeys([torch.float32, compute_dtype("auto", torch.device(device))]))
    rows = [row for compute in dtypes for row in measure(size, device, compute, options.rounds)]
    result = {
        "command": "python benchmarks/learned_cost.py",
        "date": now(),
        "device": device,
        "shape": {**SHAPE, **size},
        "tokens": size["samples"] * size["length"],
        "bar": BARS[device],
        **environment(),
        "rows": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
