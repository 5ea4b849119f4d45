"""`doctor`, `inspect --cost` and the roofline: shapes to numbers, always called predicted."""

from __future__ import annotations

import json

import pytest

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.models.roofline import GPUS, count_flops, gemm_seconds, predict
from nmsparse_deploy.system import doctor
from tests.fixtures import pico

TARGETS = [Target("w", "m", 0, 1, 4096, 14336, "m")]


def test_roofline_limits():
    gpu = GPUS[0]
    many, few = (predict(TARGETS, rows, 2 * rows * 4096 * 14336)[0] for rows in (65536, 1))
    assert many.gemm_speedup == pytest.approx(2.0)  # compute bound: twice the peak
    assert few.gemm_speedup == pytest.approx(16 / 9, rel=1e-2)  # memory bound: 9/16 of the bytes
    assert many.model_speedup == pytest.approx(many.gemm_speedup) and many.status == "predicted"
    assert gemm_seconds(gpu, 1, 64, 64, sparse=False) > 0


def test_amdahl():
    half = predict(TARGETS, 65536, 2 * (2 * 65536 * 4096 * 14336))[0]
    assert half.flop_share == pytest.approx(0.5) and half.model_speedup == pytest.approx(
        1 / (0.5 + 0.5 / 2)
    )


def test_flops_are_counted():
    module = pico.llama()
    import torch

    flops = count_flops(module, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
    gemms = sum(
        2 * 16 * p.numel() for n, p in module.named_parameters() if p.ndim == 2 and "embed" not in n
    )
    assert gemms <= flops <= 1.5 * gemms


def test_cost_is_predicted_from_shapes(llama_dir, capfd):
    assert (
        invoke(
            lambda: app(
                ["--json", "inspect", str(llama_dir), "--cost", "--samples", "8", "--length", "16"]
            )
        )
        == 0
    )
    cost = json.loads(capfd.readouterr().out)
    inside = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert cost["status"] == "predicted" and cost["tokens"] == 128
    assert cost["forward_gflop"] == pytest.approx(2 * 2 * 128 * inside / 1e9)
    assert cost["gram_gflop"] == pytest.approx(2 * 128 * 2 * (3 * 64**2 + 128**2) / 1e9)
    assert (
        invoke(
            lambda: app(["--json", "inspect", str(llama_dir), "--cost", "--method", "magnitude"])
        )
        == 0
    )
    assert json.loads(capfd.readouterr().out)["gram_gflop"] == 0


def test_doctor_never_raises_and_names_a_command(capfd):
    invoke(lambda: app(["--json", "doctor"]))
    result = json.loads(capfd.readouterr().out)
    assert {"torch", "GPU", "TensorRT", "disk", "memory"} <= {
        f["subject"] for f in result["findings"]
    }
    assert result["next"]


def test_doctor_names_clashes(monkeypatch):
    have = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0"}
    monkeypatch.setattr(doctor, "installed", have.get)
    problems = {f.subject: f for f in doctor._clashes()}
    assert (
        "overwrite" in problems["onnxruntime"].found
        and "loads TensorRT 10, not 11.4.0" in problems["TensorRT"].found
    )
    assert doctor.next_command(doctor._clashes()) == "pip uninstall onnxruntime"
    monkeypatch.setattr(
        doctor, "installed", {"onnxruntime-gpu": "1.31.1", "tensorrt": "10.3.0"}.get
    )
    assert not doctor._clashes()
