"""`--method auto` climbs down a ladder until the predicted time fits, and says so."""

from __future__ import annotations

import pytest
import torch

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find import auto
from nmsparse_deploy.find.auto import LADDER, choose
from nmsparse_deploy.find.cost import Rates, estimate
from nmsparse_deploy.find.plan.make_plan import make_plan
from nmsparse_deploy.models import load
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.recipe import Prune, validate

SLOW = Rates(torch.float32, compute=1e9, single=1e9, double=1e9)


@pytest.fixture
def slow(monkeypatch):
    """A machine of one GFLOP/s, so that choices depend on shapes alone."""
    monkeypatch.setattr(auto.Rates, "measure", classmethod(lambda cls, dtype: SLOW))


def seconds(llama_dir):
    loaded = load(str(llama_dir))
    plan = make_plan(loaded.discover(), TWO_FOUR)
    return {
        name: estimate(loaded, plan, validate(Prune, rung), SLOW).seconds
        for name, rung in LADDER.items()
    }


def test_the_ladder_gets_cheaper(llama_dir):
    times = list(seconds(llama_dir).values())
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_the_best_that_fits(slow, llama_dir):
    for name, time in seconds(llama_dir).items():
        choice = choose(str(llama_dir), {}, 1.001 * auto.SLACK * time / 60)
        assert f"'{name}'" in choice.why and choice.spec == validate(Prune, LADDER[name])
    assert "would take" in choice.why
    with pytest.raises(UsageError, match="Even 'Wanda' is predicted"):
        choose(str(llama_dir), {}, 0.0)


def test_other_settings_are_kept(slow, llama_dir):
    settings = {
        "pattern": "4:8",
        "exclude": ["*down_proj*"],
        "calibration": {"samples": 8, "length": 32},
    }
    spec = choose(str(llama_dir), settings, 1e9).spec
    assert (
        spec.pattern == "4:8" and spec.exclude == ("*down_proj*",) and spec.calibration.samples == 8
    )
    with pytest.raises(UsageError, match="chooses the refinements"):
        choose(str(llama_dir), {"refine": [{"name": "refit"}]}, 1e9)


def test_what_needs_the_whole_model_is_left_out_where_it_does_not_fit(slow, llama_dir):
    first, second, *_ = LADDER
    assert f"'{first}'" in choose(str(llama_dir), {}, 1e9, max_memory=1 << 40).why
    assert f"'{second}'" in choose(str(llama_dir), {}, 1e9, max_memory=1).why


def test_a_sample_is_halved_until_it_fits(slow, llama_dir):
    spec = validate(Prune, {"method": "sparsegpt", "calibration": {"samples": 64, "length": 32}})
    plenty = auto.shorten(str(llama_dir), spec, 1e9)
    assert plenty.spec == spec and plenty.seconds == plenty.whole
    half = auto.shorten(str(llama_dir), spec, 0.6 * plenty.whole)
    assert half.spec.calibration.samples == 32 and half.seconds <= 0.6 * half.whole
    none = auto.shorten(str(llama_dir), spec, 0.0)
    assert none.spec.calibration.samples == auto.FEWEST and none.seconds > 0
