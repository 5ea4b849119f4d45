"""Two processes of one run: other noise and other batches in each, the same masks in both."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import sys
    from pathlib import Path
    from safetensors.torch import save_file
    from nmsparse_deploy.methods.maskllm import LEARNED
    from nmsparse_deploy.rundir import RunDir
    from nmsparse_deploy.train.checkpoint import Checkpoints
    from nmsparse_deploy.train.loop import fit
    from nmsparse_deploy.train.maskparam import Choice
    from tests.train.toys import NAME, Planted, settings

    drawn = []
    plain = Choice.soft
    def soft(self, values, rows, moment, name):
        seen = plain(self, values, rows, moment, name)
        drawn.append((moment.rank, seen.detach()))
        return seen
    Choice.soft = soft
    subject, spec = Planted(), settings(steps=30, batch=128, step_size=5.0, evaluate_every=10, checkpoint_every=10)
    seen, terms = [], subject.loss_terms
    subject.loss_terms = lambda number: seen.append(number) or terms(number)
    folder = Path(sys.argv[1])
    outcome = fit(subject, LEARNED.make(spec), subject.prior, spec, checkpoints=Checkpoints(RunDir(folder), "c.safetensors"))
    assert outcome.facts["processes"] == 2 and outcome.facts["samples_per_step"] == 128
    import torch
    save_file({"mask": outcome.learnt[NAME].mask, "first": drawn[0][1], "numbers": torch.tensor(seen),
               "best": torch.tensor(outcome.facts["best"]), "prior": torch.tensor(outcome.facts["prior"]),
               "changed": (outcome.learnt[NAME].mask != subject.prior[NAME]).sum()}, folder / f"rank{drawn[0][0]}.safetensors")
"""


def test_two_processes_end_with_the_same_masks(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend",
               "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(one["mask"], two["mask"]) and one["best"] == two["best"] < one["prior"]
    assert int(one["changed"]) > 0
    assert not torch.equal(one["first"], two["first"])  # noise
    assert not set(one["numbers"][:10].tolist()) & set(two["numbers"][:10].tolist())  # batches of the first half epoch
    assert (tmp_path / "c.safetensors").is_file()


def _environment() -> dict[str, str]:
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER", "LOCAL"))}
    return {**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
