"""What test_killed.py runs: learn on a two-block model, die by SIGKILL on the way, go on, end like an unbroken run.

`python -m tests.train.killed FOLDER WHICH` prints one JSON line a case. Every training is a process of its own, forked
from this one after the imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from nmsparse_deploy.methods import maskllm, maskpro, proxsparse
from nmsparse_deploy.models.discover import discover
from nmsparse_deploy.objective import Objective
from nmsparse_deploy.pattern import TWO_FOUR, project
from nmsparse_deploy.plan import make_plan
from nmsparse_deploy.refine.base import Whole
from nmsparse_deploy.refine.finetune import Tuner, refine
from nmsparse_deploy.rundir import RunDir
from nmsparse_deploy.steps import Finetune
from nmsparse_deploy.train.checkpoint import Checkpoints
from nmsparse_deploy.train.loop import fit
from nmsparse_deploy.train.masked import Site
from nmsparse_deploy.train.subjects import WholeModel
from nmsparse_deploy.train_settings import MaskLLM, MaskPro, ProxSparse
from tests import pico

STEPS = 7
COMMON = {"steps": STEPS, "batch": 4, "evaluate_every": 3, "checkpoint_every": 2, "holdout": 0.25, "warmup": 1}
LEARNED = {"objective": "global", **COMMON}
CASES = {
    "maskllm": (maskllm.LEARNED.make, MaskLLM(**LEARNED, step_size=20.0)),
    "maskllm-compact": (maskllm.LEARNED.make, MaskLLM(**LEARNED, step_size=20.0, form="compact")),
    "maskllm-scores": (maskllm.LEARNED.make, MaskLLM(**LEARNED, step_size=20.0, form="scores")),
    "proxsparse": (proxsparse.Prox, ProxSparse(**LEARNED, reach=5.0)),
    "maskpro": (maskpro.PolicyGradient, MaskPro(**LEARNED, step_size=1.0)),
    **{how: (None, Finetune(**COMMON, how=how, rate=3e-3, refresh=1, distill=0.0, frozen=0.34))
       for how in ("fixed", "sr-ste", "s-ste", "adapters")},
}
FEW = ("maskllm", "proxsparse", "maskpro", "sr-ste")
WRITING = "writing"
"""Die while the second checkpoint is being written."""


def learn(case: str, file: Path) -> None:
    """Train a case to its end, with its checkpoint at `file`."""
    make, spec = CASES[case]
    module = pico.llama(hidden_size=32, intermediate_size=64)
    ids = torch.randint(pico.VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "use_cache": False} for part in ids.split(2)]
    found = make_plan(discover(module, {"input_ids": ids[:2]}), TWO_FOUR)
    sites = {row.target.name: Site(row.target.name, row.target.name, row.target.axis, TWO_FOUR)
             for row in found.pruned()}
    dense = {name: module.get_parameter(name).detach().clone() for name in sites}
    masks = {name: project(weight.abs(), TWO_FOUR) for name, weight in dense.items()}
    subject = WholeModel(module, sites, batches, Objective("cross-entropy"), spec)
    store = Checkpoints(RunDir(file.parent), file.name)
    if make is not None:
        fit(subject, make(spec), masks, spec, checkpoints=store)
        return
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    refine(Whole(subject, masks, dense.__getitem__, 0, store, lambda *_: None), spec)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(case: str, file: Path, when: int | str) -> None:
    """The same, until `after_step` of step `when`, or until a checkpoint is to take its place."""
    if when == WRITING:
        replace, calls = os.replace, []

        def replaced(old, new):
            calls.append(new)
            return replace(old, new) if len(calls) < 2 else die()

        os.replace = replaced
    for learner in {maskllm.MaskLearner, proxsparse.Prox, maskpro.PolicyGradient, Tuner}:
        def after_step(self, moment, plain=learner.after_step):
            return die() if moment.step == when else plain(self, moment)

        learner.after_step = after_step
    learn(case, file)


def forked(work: Callable[[], None]) -> int:
    """What a child process that does `work` ended with: 0, 1 or the negative signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def compared(case: str, folder: Path, whens: list[int | str]) -> dict:
    """How the children of a case ended, and whether the last checkpoints are the same bits."""
    whole = folder / f"{case}.safetensors"
    ends, same = [forked(partial(learn, case, whole))], []
    for when in whens:
        file = folder / f"{case}-{when}.safetensors"
        ends += [forked(partial(doomed, case, file, when)), forked(partial(learn, case, file))]
        one, two = load_file(whole), load_file(file)
        same.append(one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one))
    moved = [key for key in load_file(whole) if key.startswith("best:")]
    return {"case": case, "whens": whens, "ends": ends, "same": same, "tensors": len(moved)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = sys.argv[2] == "every"
    for name in CASES if every else FEW:
        print(json.dumps(compared(name, Path(sys.argv[1]), [*range(STEPS), WRITING] if every else [0, 4, WRITING])),
              flush=True)
