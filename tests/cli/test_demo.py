"""What `demo` asks for: all of it, or as much as the machine does in minutes."""

from __future__ import annotations

import pytest

from nmsparse_deploy.cli import demo as verb
from nmsparse_deploy.find import auto
from nmsparse_deploy.recipe import CLOSED_FORM
from nmsparse_deploy.runs.manifest import RecipeRecord
from nmsparse_deploy.runs.run_dir import RunDir


@pytest.fixture
def slow(monkeypatch):
    """A machine on which only 16 samples fit."""

    def shorten(model, spec, seconds, progress):
        calibration = spec.calibration.model_copy(update={"samples": 16})
        return auto.Shortened(spec.model_copy(update={"calibration": calibration}), 200.0, 800.0)

    monkeypatch.setattr(auto, "shorten", shorten)


def test_short_takes_what_fits_and_keeps_to_it(slow, tmp_path, capsys):
    recipe = verb._short("demo", tmp_path / "run", force=False)
    assert recipe.prune.calibration.samples == 16 and recipe.export.precisions == ("fp32",)
    assert recipe.evaluate.tokens == 8192
    assert "200 s with 16 calibration samples (800 s with all 64)" in capsys.readouterr().err
    calibration = CLOSED_FORM.calibration.model_copy(update={"samples": 32})
    earlier = CLOSED_FORM.model_copy(update={"calibration": calibration})
    RunDir.create(tmp_path / "run", RecipeRecord.of("demo", earlier), "0", force=False)
    again = verb._short("demo", tmp_path / "run", force=False)
    assert again.prune.calibration.samples == 32  # the run that is there goes on
    assert verb._short("demo", tmp_path / "run", force=True).prune.calibration.samples == 16
