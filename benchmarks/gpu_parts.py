"""The parts of the GPU proof. Each measures one thing and saves as it goes: `python -m benchmarks.gpu_parts NAME ...`.

Nothing here decides what may be claimed; every figure comes from the package's own timing and evidence.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.files import write_json

VIT_B = ((768, 3072), (3072, 768), (768, 2304), (768, 768))
VIT_L = ((1024, 4096), (4096, 1024), (1024, 3072), (1024, 1024))
LLAMA_1B = ((2048, 8192), (8192, 2048), (2048, 16384), (2048, 3072), (2048, 2048))
LLAMA_8B = ((4096, 14336), (14336, 4096), (4096, 28672), (4096, 6144), (4096, 4096))
"""K x N: single layers first, then q/k/v and gate/up merged as compilers do."""
ROWS = (4096, 16384, 1024, 256, 64, 16)
LADDER = (*(("Llama-8B", shape) for shape in LLAMA_8B), *(("ViT-L/16", shape) for shape in VIT_L),
          *(("Llama-1B", shape) for shape in LLAMA_1B), *(("ViT-B/16", shape) for shape in VIT_B))
"""What matters most comes first: the part ends where its time does."""
PRECISIONS = ("fp16", "fp8", "int8", "bf16")
DRY_SHAPES, DRY_ROWS = (("tiny", (64, 128)),), (16, 32)


@dataclass
class Setting:
    """One part's run: where it is timed, until when, and how it saves what it has."""

    machine: Any
    until: float
    save: Callable[[dict[str, Any]], None]
    dry: bool

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


def ladder(setting: Setting) -> None:
    """Dense against sparse for every shape, number of rows and precision, most important first."""
    from nmsparse_deploy.measure.bench.crossover import crossover, markdown, tables, wins

    lines: list[Any] = []
    listed = DRY_SHAPES if setting.dry else LADDER
    for name, shape in listed:
        for precision in PRECISIONS:
            lines += crossover([shape], DRY_ROWS if setting.dry else ROWS, [precision], setting.machine,
                               5 if setting.dry else 11, until=setting.until)
        setting.save({"models": {f"{k}x{n}": model for model, (k, n) in listed}, "done_to": name,
                      "lines": [{**asdict(line), "teraflops": line.teraflops} for line in lines],
                      "wins": {one: wins([line for line in lines if line.precision == one]) for one in PRECISIONS},
                      "libraries": next(iter(tables(lines, setting.machine).values()))["libraries"],
                      "markdown": markdown(lines, setting.machine)})


def vit(setting: Setting) -> None:
    """ViT-L/16 with random weights at batch 64, in every precision that there is time for."""
    from transformers import ViTConfig, ViTForImageClassification

    def make() -> Any:
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                 "image_size": 32, "patch_size": 8} if setting.dry else {
                     "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                     "intermediate_size": 4096, "image_size": 224, "patch_size": 16}
        return ViTForImageClassification(ViTConfig(**shape, num_labels=1000 if not setting.dry else 10)), "vision"

    _arms(setting, "ViT-L/16", make, [(2 if setting.dry else 64, 1)])


def llama(setting: Setting) -> None:
    """A stack of four layers in the shape of Llama-8B: prefill of 4096 tokens, one decoding step for 1 and 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> Any:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 64} if setting.dry else {
                     "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
        return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=8192)), "llm"

    _arms(setting, "Llama-8B shapes, 4 layers", make, [(1, 16)] if setting.dry else [(1, 4096), (16, 512)])


def _arms(setting: Setting, name: str, make: Callable[[], Any], jobs: list[tuple[int, int]]) -> None:
    """All arms of a model with random weights and a magnitude mask."""
    from nmsparse_deploy.measure.bench.model_arms import Job

    done: dict[str, Any] = {"model": name, "weights": "random", "runs": []}
    for precision in PRECISIONS:
        for batch, length in jobs:
            if setting.left < 15 and done["runs"]:
                setting.save({**done, "left_out": "there was no time left"})
                return
            job = Job(batch, length, precision, 5 if setting.dry else 31)
            done["runs"].append(_caught(partial(_random_arms, setting, name, make, job), job))
            setting.save(done)
            _release(setting.machine)


def _random_arms(setting: Setting, name: str, make: Callable[[], Any], job: Any) -> dict[str, Any]:
    from nmsparse_deploy.measure.bench.model_arms import bench_arms
    from nmsparse_deploy.models.loaded import LoadedModel
    from nmsparse_deploy.models.preprocess import from_config
    from nmsparse_deploy.registry import ADAPTERS

    module, family = _on(setting.machine, make)
    processor = from_config(module.config) if family == "vision" else None
    loaded = LoadedModel(module, name, name, family, ADAPTERS.load("transformers"), processor)
    return bench_arms(loaded, magnitude(loaded), job, setting.machine)


def _on(machine: Any, make: Callable[[], Any]) -> Any:
    """Built on the device: random numbers for a billion weights take a processor too long."""
    import torch

    torch.manual_seed(0)
    with machine.device:
        module, family = make()
    return module.eval(), family


def _caught(call: Callable[[], dict[str, Any]], job: Any) -> dict[str, Any]:
    """What a model gave, or why it gave nothing; the next precision may do better."""
    from nmsparse_deploy.errors import NmsparseError, first_line

    try:
        return call()
    except (NmsparseError, RuntimeError, NotImplementedError) as error:
        return {"status": "failed", "precision": job.precision, "batch": job.batch, "length": job.length,
                "reason": first_line(error)}


def _release(machine: Any) -> None:
    import gc

    import torch

    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def magnitude(loaded: Any) -> Any:
    """A 2:4 mask for every target, by magnitude."""
    from nmsparse_deploy.masks import Mask, MaskSet, project
    from nmsparse_deploy.pattern import TWO_FOUR

    found = loaded.discover()
    return MaskSet({target.name: Mask.pack(project(loaded.module.get_parameter(target.name).detach().abs(), TWO_FOUR,
                                                   target.axis), target.axis, TWO_FOUR, "")
                    for target in found.targets if target.k % TWO_FOUR.group == 0})


def learning(setting: Setting) -> None:
    """A MaskLLM step on a frozen model against a plain training step of it: 32 x 1024 tokens, time and memory."""
    from benchmarks.gpu_step import compare_steps

    compare_steps(setting)


def small(setting: Setting) -> None:
    """The small real models whose files are here."""
    from nmsparse_deploy import models
    from nmsparse_deploy.errors import NmsparseError, first_line
    from nmsparse_deploy.measure.bench.model_arms import Job, bench_arms

    done: dict[str, Any] = {"runs": [], "missing": []}
    jobs = {"demo": (4, 1024), "vit": (64, 1), "minilm": (64, 128)}
    for name, (batch, length) in ({} if setting.dry else jobs).items():
        if setting.left < 15:
            done["missing"].append({"model": name, "why": "there was no time left"})
            continue
        try:
            loaded = models.load(name)
        except (NmsparseError, ImportError, OSError) as error:
            done["missing"].append({"model": name, "why": first_line(error)})
            setting.save(done)
            continue
        loaded.module.to(setting.machine.device)
        job = Job(batch, length, "fp16", 15)
        done["runs"].append({"model": name, **_caught(
            lambda loaded=loaded, job=job: bench_arms(loaded, magnitude(loaded), job, setting.machine), job)})
        setting.save(done)
        _release(setting.machine)
    setting.save(done)


def compiled(setting: Setting) -> None:
    """One Llama-8B MLP under torch.compile, dense and sparse, at 4096 rows, replayed as CUDA graphs."""
    import torch

    from nmsparse_deploy.errors import first_line
    from nmsparse_deploy.ship.torch_sparse.kernel_choice import twins
    from nmsparse_deploy.system.timing import interleave, ratio, summarise

    k, n, rows = (64, 128, 16) if setting.dry else (4096, 14336, 4096)
    machine, done = setting.machine, {"k": k, "n": n, "rows": rows, "precisions": {}}
    for precision in ("fp16", "fp8"):
        def made(precision: str = precision) -> dict[str, Any]:
            up, down = (twins(*shape, precision, machine.device) for shape in ((k, n), (n, k)))
            x = torch.randn(rows, k, device=machine.device).to(up.out)
            calls = {}
            for arm in ("dense", "sparse"):
                first, second = getattr(up, arm), getattr(down, arm)
                whole = torch.compile(lambda x, first=first, second=second: second(torch.nn.functional.silu(first(x))),
                                      backend="eager" if setting.dry else "inductor")
                with torch.inference_mode():
                    whole(x)
                    call = torch.inference_mode()(lambda whole=whole: whole(x))
                    calls[arm] = machine.graph(call) if machine.graph else call
            times = interleave(calls, 5 if setting.dry else 31, clock=machine.clock())
            return {"arms": [asdict(summarise(arm, arm, times[arm])) for arm in times],
                    "sparse_over_dense": ratio(times["dense"], times["sparse"])}

        try:
            done["precisions"][precision] = made()
        except Exception as error:  # compilers fail in many ways; this part is about whether they do
            done["precisions"][precision] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        setting.save(done)


def tests(setting: Setting) -> None:
    """The tests that need a CUDA device."""
    folder = Path(__file__).parent.parent / "tests" / "gpu"
    command = [sys.executable, "-m", "pytest", str(folder), "-m", "gpu", "-q", "-p", "no:cacheprovider", "-o",
               "addopts=", *(["--collect-only"] if setting.dry else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent.parent)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    setting.save({"code": done.returncode, "summary": lines[-1] if lines else done.stderr[-300:],
                  "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))]})
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}: {lines[-1] if lines else done.stderr[-300:]}")


PARTS: dict[str, tuple[Callable[[Setting], None], int]] = {
    "ladder": (ladder, 150), "vit": (vit, 75), "llama": (llama, 80), "learning": (learning, 55), "tests": (tests, 60),
    "compiled": (compiled, 45), "small": (small, 35)}
"""What there is, with its limit in seconds; in the order of importance."""


def run_part(name: str, seconds: float, out: Path, dry: bool) -> None:
    """Run one part on this machine, or dry."""
    from nmsparse_deploy.ship.torch_sparse.semi_structured import StandIn, standing_in
    from nmsparse_deploy.system.gpu_clock import dry_machine, require_gpu

    machine = dry_machine() if dry else require_gpu("The GPU proof")

    def save(data: dict[str, Any]) -> None:
        write_json(out, {"dry": dry, **data})

    with ExitStack() as stack:
        if dry:
            stack.enter_context(standing_in(StandIn()))
        PARTS[name][0](Setting(machine, time.monotonic() + seconds, save, dry))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny, on a processor, measuring nothing")
    given = parser.parse_args()
    run_part(given.part, given.seconds, given.out, given.dry)


if __name__ == "__main__":
    main()
