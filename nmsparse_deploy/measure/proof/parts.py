"""The parts of the proof. Each measures one thing in a process of its own and saves as it goes.

Nothing here decides what may be claimed; every figure comes from the package's own timing and
evidence.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue

from nmsparse_deploy import models
from nmsparse_deploy.errors import NmsparseError, first_line
from nmsparse_deploy.masks import Mask, MaskSet, project
from nmsparse_deploy.measure.bench.crossover import Line, crossover, markdown, wins
from nmsparse_deploy.measure.bench.model_arms import Job, bench_arms
from nmsparse_deploy.models.loaded import LoadedModel
from nmsparse_deploy.models.preprocess import from_config
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.registry import ADAPTERS
from nmsparse_deploy.runs.run_dir import RunDir
from nmsparse_deploy.ship.torch_sparse.kernel_choice import twins
from nmsparse_deploy.ship.torch_sparse.semi_structured import StandIn, standing_in
from nmsparse_deploy.system.gpu_clock import Machine, dry_machine, require_gpu
from nmsparse_deploy.system.timing import interleave, ratio, summarise

VIT_B = ((768, 3072), (3072, 768), (768, 2304), (768, 768))
VIT_L = ((1024, 4096), (4096, 1024), (1024, 3072), (1024, 1024))
LLAMA_1B = ((2048, 8192), (8192, 2048), (2048, 16384), (2048, 3072), (2048, 2048))
LLAMA_8B = ((4096, 14336), (14336, 4096), (4096, 28672), (4096, 6144), (4096, 4096))
"""K x N: single layers first, then q/k/v and gate/up merged as compilers do."""
ROWS = (4096, 16384, 1024, 256, 64, 16)
LADDER = (
    *(("Llama-8B", shape) for shape in LLAMA_8B),
    *(("ViT-L/16", shape) for shape in VIT_L),
    *(("Llama-1B", shape) for shape in LLAMA_1B),
    *(("ViT-B/16", shape) for shape in VIT_B),
)
"""What matters most comes first: the part ends where its time does."""
VIT, LLAMA = "ViT-L/16", "Llama-8B shapes, 4 layers"
PRECISIONS = ("fp16", "fp8", "int8", "bf16")
DRY_SHAPES, DRY_ROWS = (("tiny", (64, 128)),), (16, 32)


@dataclass(frozen=True)
class PartRun:
    """One part's surroundings: where it is timed, until when, and how it saves what it has."""

    machine: Machine
    until: float
    save: Callable[[Mapping[str, JsonValue]], None]
    dry: bool

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


def ladder(setting: PartRun) -> None:
    """Time dense against sparse for every shape, number of rows and precision, most important
    first."""
    lines: list[Line] = []
    listed = DRY_SHAPES if setting.dry else LADDER
    for name, shape in listed:
        for precision in PRECISIONS:
            lines += crossover(
                [shape],
                DRY_ROWS if setting.dry else ROWS,
                [precision],
                setting.machine,
                5 if setting.dry else 11,
                until=setting.until,
            )
        shapes = {
            precision: wins([line for line in lines if line.precision == precision])
            for precision in PRECISIONS
        }
        setting.save(
            {
                "models": {f"{k}x{n}": model for model, (k, n) in listed},
                "done_to": name,
                "lines": jsonable(
                    [{**asdict(line), "teraflops": line.teraflops} for line in lines]
                ),
                "wins": jsonable(
                    {precision: [asdict(row) for row in rows] for precision, rows in shapes.items()}
                ),
                "markdown": markdown(lines, setting.machine),
            }
        )


def vit(setting: PartRun) -> None:
    """Time ViT-L/16 with random weights at batch 64, in every precision that there is time for."""
    from transformers import ViTConfig, ViTForImageClassification

    def build() -> LoadedModel:
        size = (
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=32,
                patch_size=8,
            )
            if setting.dry
            else ViTConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                image_size=224,
                patch_size=16,
            )
        )
        size.num_labels = 10 if setting.dry else 1000
        return LoadedModel(
            ViTForImageClassification(size),
            VIT,
            VIT,
            "vision",
            ADAPTERS.load("transformers"),
            from_config(size),
        )

    _arms(setting, VIT, build, [(2 if setting.dry else 64, 1)])


def llama(setting: PartRun) -> None:
    """Time four layers in the shape of Llama-8B: a prefill of 4096 tokens, and a decoding step for
    1 and for 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> LoadedModel:
        size = (
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
            )
            if setting.dry
            else LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=4,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=32000,
                max_position_embeddings=8192,
            )
        )
        return LoadedModel(
            LlamaForCausalLM(size), LLAMA, LLAMA, "llm", ADAPTERS.load("transformers")
        )

    _arms(setting, LLAMA, build, [(1, 16)] if setting.dry else [(1, 4096), (16, 512)])


def _arms(
    setting: PartRun, name: str, build: Callable[[], LoadedModel], jobs: list[tuple[int, int]]
) -> None:
    """Time all arms of a model with random weights and a magnitude mask."""
    runs: list[JsonValue] = []
    for precision in PRECISIONS:
        for batch, length in jobs:
            if setting.left < 15 and runs:
                return
            torch.manual_seed(0)
            with (
                setting.machine.device
            ):  # random numbers for a billion weights take a processor too long
                loaded = build()
            loaded.module.eval()
            runs.append(
                _timed(setting, loaded, Job(batch, length, precision, 5 if setting.dry else 31))
            )
            setting.save({"model": name, "weights": "random", "runs": runs})
            del loaded
            _release(setting.machine)


def _timed(setting: PartRun, loaded: LoadedModel, job: Job) -> JsonValue:
    """Return what the arms gave, or why they gave nothing; the next precision may do better."""
    try:
        return jsonable(bench_arms(loaded, magnitude(loaded), job, setting.machine).to_json())
    except (NmsparseError, RuntimeError, NotImplementedError) as error:
        return {
            "status": "failed",
            "precision": job.precision,
            "batch": job.batch,
            "length": job.length,
            "reason": first_line(error),
        }


def _release(machine: Machine) -> None:
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def magnitude(loaded: LoadedModel) -> MaskSet:
    """Return a 2:4 mask for every target, by magnitude."""
    targets = loaded.discover().targets
    return MaskSet(
        {
            target.name: Mask.pack(
                project(
                    loaded.module.get_parameter(target.name).detach().abs(), TWO_FOUR, target.axis
                ),
                target.axis,
                TWO_FOUR,
                "",
            )
            for target in targets
            if target.k % TWO_FOUR.group == 0
        }
    )


def small(setting: PartRun) -> None:
    """Time the small real models whose files are here."""
    runs: list[JsonValue] = []
    missing: list[JsonValue] = []
    for name, batch, length in (
        () if setting.dry else (("demo", 4, 1024), ("vit", 64, 1), ("minilm", 64, 128))
    ):
        try:
            if setting.left < 15:
                raise NmsparseError("there was no time left")
            loaded = models.load(name)
        except (NmsparseError, ImportError, OSError) as error:
            missing.append({"model": name, "why": first_line(error)})
            continue
        loaded.module.to(setting.machine.device)
        runs.append({"model": name, "run": _timed(setting, loaded, Job(batch, length, "fp16", 15))})
        setting.save({"runs": runs, "missing": missing})
        _release(setting.machine)
    setting.save({"runs": runs, "missing": missing})


def compiled(setting: PartRun) -> None:
    """Time one Llama-8B MLP under torch.compile, dense and sparse, at 4096 rows, replayed as CUDA
    graphs."""
    k, n, rows = (64, 128, 16) if setting.dry else (4096, 14336, 4096)
    done: dict[str, JsonValue] = {}
    for precision in ("fp16", "fp8"):
        try:
            done[precision] = _compiled(setting, precision, k, n, rows)
        except (
            Exception
        ) as error:  # compilers fail in many ways; this part is about whether they do
            done[precision] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        setting.save({"k": k, "n": n, "rows": rows, "precisions": done})


def _compiled(setting: PartRun, precision: str, k: int, n: int, rows: int) -> JsonValue:
    machine = setting.machine
    up, down = (twins(*shape, precision, machine.device) for shape in ((k, n), (n, k)))
    x = torch.randn(rows, k, device=machine.device).to(up.out)
    calls = {}
    for arm in ("dense", "sparse"):
        first, second = getattr(up, arm), getattr(down, arm)
        whole = torch.compile(
            lambda x, first=first, second=second: second(torch.nn.functional.silu(first(x))),
            backend="eager" if setting.dry else "inductor",
        )
        with torch.inference_mode():
            whole(x)
            call = torch.inference_mode()(partial(whole, x))
            calls[arm] = machine.graph(call) if machine.graph else call
    times = interleave(calls, 5 if setting.dry else 31, clock=machine.clock())
    return jsonable(
        {
            "arms": [asdict(summarise(arm, arm, times[arm])) for arm in times],
            "sparse_over_dense": asdict(ratio(times["dense"], times["sparse"])),
        }
    )


def jsonable(value: object) -> JsonValue:
    """Return `value` as JSON gives it back."""
    plain: JsonValue = json.loads(json.dumps(value, default=str))
    return plain


PARTS: dict[str, Callable[[PartRun], None]] = {
    "ladder": ladder,
    "vit": vit,
    "llama": llama,
    "compiled": compiled,
    "small": small,
}


def measure(part: Callable[[PartRun], None], seconds: float, out: Path, dry: bool) -> None:
    """Run a part on this machine, or dry."""
    machine = dry_machine() if dry else require_gpu("The proof")

    def save(data: Mapping[str, JsonValue]) -> None:
        with RunDir(out.parent).replacing(out.name) as temporary:
            temporary.write_text(
                json.dumps({"dry": dry, **data}, indent=1) + "\n", encoding="utf-8"
            )

    with standing_in(StandIn()) if dry else nullcontext():
        part(PartRun(machine, time.monotonic() + seconds, save, dry))


def main(parts: Mapping[str, Callable[[PartRun], None]] = PARTS) -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on a processor, measuring nothing"
    )
    given = parser.parse_args()
    measure(parts[given.part], given.seconds, given.out, given.dry)


if __name__ == "__main__":
    main()
