"""What test_processes.py runs in two processes: `torchrun ... two_processes.py FOLDER` writes what each saw and found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.methods import maskllm, maskpro, proxsparse
from nmsparse_deploy.rundir import RunDir
from nmsparse_deploy.train.checkpoint import Checkpoints
from nmsparse_deploy.train.loop import fit
from nmsparse_deploy.train.maskparam import Choice
from nmsparse_deploy.train_settings import MaskPro, ProxSparse
from tests.train.toy import Killed, Planted, Toy, settings

SETTINGS = {"steps": 30, "batch": 128, "step_size": 5.0, "evaluate_every": 10, "checkpoint_every": 10}
FAST = {"steps": 16, "batch": 32, "evaluate_every": 4, "checkpoint_every": 4}
facts: dict[str, dict] = {}
tensors: dict[str, torch.Tensor] = {}


def keep(name, outcome):
    facts[name] = {key: value for key, value in outcome.facts.items() if key not in ("seconds", "judged_at")}
    tensors.update({f"{name}/{site}": one.mask for site, one in outcome.learnt.items()})


def killed_and_resumed(make, step, spec, toy, store):
    """`fit` that is left after `step` and started again, in both processes."""
    learner = make(spec)
    after = learner.after_step

    def stop(moment):
        if moment.step == step:
            raise Killed
        after(moment)

    learner.after_step = stop
    try:
        fit(toy(), learner, toy().corrupted(), spec, checkpoints=store)
    except Killed:
        return fit(toy(), make(spec), toy().corrupted(), spec, checkpoints=store)
    raise AssertionError("nobody killed it")


def main(folder: Path) -> None:
    drawn, plain = [], Choice.soft

    def soft(self, values, rows, moment, name):
        seen = plain(self, values, rows, moment, name)
        drawn.append((moment.rank, seen.detach().clone()))
        return seen

    Choice.soft = soft
    for name, shard in (("parallel", False), ("sharded", True)):
        subject, spec = Planted(), settings(**SETTINGS, shard=shard)
        seen, terms = [], subject.loss_terms
        subject.loss_terms = lambda number, moment, seen=seen, terms=terms: seen.append(number) or terms(number, moment)
        module, weight = subject.module, subject.module.weight
        drawn.clear()
        keep(name, fit(subject, maskllm.LEARNED.make(spec), subject.prior, spec,
                       checkpoints=Checkpoints(RunDir(folder), f"{name}.safetensors")))
        assert subject.module is module and module.weight is weight and type(weight) is torch.nn.Parameter
        assert not module._forward_hooks and not module._forward_pre_hooks
        tensors[f"{name}/first"], tensors[f"{name}/numbers"] = drawn[0][1], torch.tensor(seen)
    rank = drawn[0][0]
    for name, make, spec in (("prox", proxsparse.Prox, ProxSparse(**FAST, reach=5.0, shard=True)),
                             ("maskpro", maskpro.PolicyGradient, MaskPro(**FAST, flips=20))):
        store = Checkpoints(RunDir(folder), f"{name}.safetensors")
        keep(name, fit(Toy(), make(spec), Toy().corrupted(), spec, checkpoints=store))
        store = Checkpoints(RunDir(folder), f"{name}-again.safetensors")
        keep(f"{name}-again", killed_and_resumed(make, 6, spec, Toy, store))
    spec = MaskPro(**FAST, shard=True)
    try:
        fit(Toy(), maskpro.PolicyGradient(spec), Toy().corrupted(), spec)
    except UsageError as error:
        facts["refused"] = {"sentence": error.message, "hint": error.hint}
    save_file(tensors, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
