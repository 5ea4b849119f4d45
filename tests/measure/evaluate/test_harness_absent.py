"""Nothing of lm-evaluation-harness is needed or imported until a task is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nmsparse_deploy.errors import MissingExtra
from nmsparse_deploy.measure.evaluate.harness import torch_lm


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="needs the package 'lm-eval'") as caught:
        torch_lm(None)
    assert "nmsparse-deploy[eval]" in caught.value.hint


def test_evaluating_imports_no_harness():
    code = "import sys, nmsparse_deploy.pipeline; print('lm_eval' in sys.modules, 'timm' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["False", "False"]
