"""Two processes share the calibration sequences: statistics and masks are those of one, one of them
writes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.calibration.layer_stats import StatsAccumulator
from nmsparse_deploy.find.calibration.shared import SUMS, share
from nmsparse_deploy.find.prune_checks import check_shared
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.system.distributed import Processes
from tests import ROOT
from tests.find.test_prune import spec
from tests.fixtures import pico

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from nmsparse_deploy.find import prune_block as block
    from nmsparse_deploy.system import distributed
    from nmsparse_deploy.find.prune import prune
    from nmsparse_deploy.recipe import Prune

    model, spec, out = sys.argv[1:]
    scores, plain = {}, block._prune_layer
    def watched(module, row, stats, *rest):
        scores[row.target.name] = stats.rms.clone()
        scores[row.target.name + "|gram"] = stats.gram.clone()
        scores[row.target.name + "|tokens"] = torch.tensor(stats.tokens)
        return plain(module, row, stats, *rest)
    block._prune_layer = watched
    said = []
    run = prune(model, Prune.model_validate_json(spec), Path(out), progress=lambda text, *_: said.append(text))
    assert run.finished("prune")
    assert bool(said) == (distributed.current().rank == 0)
    save_file(scores, f"{out}-{distributed.current().world}-{distributed.current().rank}.safetensors")
"""


def processes(count: int, script: Path, *arguments: str) -> None:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD", "MASTER", "LOCAL"))
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(count),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(script),
        *arguments,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_prune_as_one(texts, tmp_path):
    """Fifteen samples in batches of two: shares of different sizes."""
    folder = pico.save(pico.llama(num_hidden_layers=3), tmp_path / "model")
    recipe = spec(
        texts,
        "sparsegpt",
        compute="fp32",
        calibration={"data": str(texts["calibration"]), "samples": 15, "length": 128, "batch": 2},
    )
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for count in (1, 2):
        processes(
            count, script, str(folder), recipe.model_dump_json(), str(tmp_path / f"run{count}")
        )
    one = load_file(tmp_path / "run1-1-0.safetensors")
    first, second = (load_file(tmp_path / f"run2-2-{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        assert torch.equal(first[name], second[name]), "the same bits in both processes"
    assert any(not torch.equal(one[name], first[name]) for name in one), (
        "two processes add in another order"
    )
    for name in one:
        torch.testing.assert_close(
            first[name], one[name], rtol=1e-4, atol=1e-4 * float(one[name].abs().max())
        )
    masks = [MaskSet.load(tmp_path / f"run{count}/masks.safetensors").masks for count in (1, 2)]
    equal = [int((masks[0][name].unpack() == masks[1][name].unpack()).sum()) for name in masks[0]]
    places = [mask.unpack().numel() for mask in masks[0].values()]
    assert sum(equal) / sum(places) > 0.999, [same / all_ for same, all_ in zip(equal, places)]
    assert not list((tmp_path / "run2").glob("blocks")), "what was in between is cleared away"


class Team(Processes):
    """Stands in for several processes: what the others give is known beforehand."""

    def __init__(self, others: list[StatsAccumulator]) -> None:
        object.__setattr__(self, "rank", 0)
        object.__setattr__(self, "world", len(others) + 1)
        object.__setattr__(self, "others", others)
        object.__setattr__(self, "field", iter(()))

    def gather(self, value):
        shapes = [
            [
                (
                    each.tokens,
                    [
                        None if (v := getattr(each, name)) is None else tuple(v.shape)
                        for name in SUMS
                    ],
                )
            ]
            for each in self.others
        ]
        present = [
            name
            for name in SUMS
            if any(getattr(each, name) is not None for each in self.others)
            or value[0][1][SUMS.index(name)]
        ]
        object.__setattr__(self, "field", iter(present))
        return [value, *shapes]

    def add(self, tensor):
        name = next(self.field)
        for each in self.others:
            if getattr(each, name) is not None:
                tensor += getattr(each, name)
        return tensor


@pytest.mark.parametrize("need", ["norms", "gram"])
@pytest.mark.parametrize("shares", [(5, 3, 2), (0, 6, 4), (10, 0, 0)])
@pytest.mark.parametrize("narrow", [False, True])
def test_sums_of_shares_are_the_sum(need, shares, narrow):
    """Also where a process saw nothing, as an expert may."""
    layer, x, drift = torch.nn.Linear(6, 4), torch.randn(10, 6), torch.randn(10, 4)
    parts = []
    for rows, away in zip(x.split(shares), drift.split(shares)):
        parts.append(StatsAccumulator(need))
        if len(rows):
            parts[-1].update(layer, rows, 2 * rows, away, away if narrow else None)
    share([parts[0]], torch.device("cpu"), Team(parts[1:]))
    found, whole = parts[0].finish(), StatsAccumulator(need)
    whole.update(layer, x, 2 * x, drift, drift if narrow else None)
    wanted = whole.finish()
    assert found.tokens == wanted.tokens == 10
    for name in SUMS:
        if getattr(wanted, name) is None:
            assert getattr(found, name) is None
        else:
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5
            )


def test_what_cannot_be_shared(texts):
    two = Processes(0, 2)
    for recipe, why in (
        (spec(texts, refine=[{"name": "reconstruct"}]), "'reconstruct' sees all sequences"),
        (spec(texts, "magnitude"), "uses no data"),
        (
            spec(texts, calibration={"data": "x", "samples": 4, "length": 8, "batch": 4}),
            "cannot be shared",
        ),
    ):
        with pytest.raises(UsageError, match=why):
            check_shared(recipe, two)
    check_shared(spec(texts), two)
