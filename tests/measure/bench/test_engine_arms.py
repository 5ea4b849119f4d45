"""ONNX Runtime as a baseline: what runs is timed, what is not there is named, sparse is never
claimed."""

from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
import torch

from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.measure.bench.engine_arms import engine_phases
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.ship.engine import Case
from nmsparse_deploy.ship.onnx import export_onnx
from nmsparse_deploy.ship.onnx.onnxruntime import ALLOWED, GPU_ARMS, PLAIN, OnnxRuntime
from tests.fixtures import pico

INPUTS = {"input_ids": np.arange(16, dtype=np.int64).reshape(2, 8)}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    module, folder = pico.llama().eval(), tmp_path_factory.mktemp("fp32")
    inputs = {"input_ids": torch.from_numpy(INPUTS["input_ids"])}
    export_onnx(module, inputs, folder, "model", discover(module, inputs).targets, precision="fp32")
    return folder / "model.onnx"


def test_arms_that_run_are_timed_and_the_others_say_why_not(graph):
    given = {"cpu": {"provider": "cpu", "threads": 1}, **GPU_ARMS}
    work = {"ONNX fp32": {arm: Case(graph, settings) for arm, settings in given.items()}}
    [phase], failed = engine_phases(OnnxRuntime, work, INPUTS, {"batch": 2}, 3)
    missing = [arm for arm in GPU_ARMS if f"ONNX fp32, {arm}" in failed]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert missing == list(GPU_ARMS) and all(
            "This ONNX Runtime has no" in why for why in failed.values()
        )
    assert phase.arms[0].name == "cpu" and phase.arms[0].calls == 3 and phase.arms[0].median_ms > 0
    assert phase.over_dense == {}


def test_inputs_may_come_as_a_model_of_16_bits_takes_them(tmp_path):
    layer = torch.nn.Linear(16, 8).eval()
    torch.onnx.export(
        layer,
        (torch.ones(2, 16),),
        tmp_path / "model.onnx",
        input_names=["x"],
        dynamo=True,
        verbose=False,
    )
    engine = OnnxRuntime.build(tmp_path / "model.onnx", {"threads": 1})
    engine.bound({"x": torch.ones(2, 16, dtype=torch.bfloat16)})()


def test_nothing_that_runs_is_no_phase(graph):
    phases, failed = engine_phases(
        OnnxRuntime, {"ONNX fp32": {"cpu": Case(graph.with_name("gone.onnx"))}}, INPUTS, {}, 3
    )
    assert phases == [] and "no ONNX file" in failed["ONNX fp32, cpu"]


def test_a_bound_call_computes_what_run_does(graph, monkeypatch):
    engine = OnnxRuntime.build(graph, {"threads": 1})
    call, seen = engine.bound(INPUTS), {}
    original = type(engine._session).run_with_iobinding

    def watched(self, binding, *rest):
        original(self, binding, *rest)
        seen["out"] = binding.copy_outputs_to_cpu()[0]

    monkeypatch.setattr(type(engine._session), "run_with_iobinding", watched)
    call()
    np.testing.assert_array_equal(seen["out"], next(iter(engine.run(INPUTS).values())))
    with pytest.raises(UsageError, match="takes the inputs"):
        engine.bound({"tokens": INPUTS["input_ids"]})


class Session:
    """What a GPU build of ONNX Runtime would be asked for."""

    asked: ClassVar[list] = []

    def __init__(self, path, options, providers):
        self.asked.append(providers)
        self.providers = [one if isinstance(one, str) else one[0] for one in providers]

    def get_providers(self):
        return self.providers

    def get_inputs(self):
        return []


def test_tensorrt_is_built_with_and_without_sparse_weights_and_claims_neither(graph, monkeypatch):
    monkeypatch.setattr(Session, "asked", [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
    )
    plain, allowed = (OnnxRuntime.build(graph, GPU_ARMS[arm]).inspect() for arm in (PLAIN, ALLOWED))
    assert [asked[0] for asked in Session.asked] == [
        ("TensorrtExecutionProvider", {"trt_sparsity_enable": flag}) for flag in (False, True)
    ]
    assert plain.sparse_kernels is False and allowed.sparse_kernels is None
    assert "does not say which" in allowed.reason
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(NmsparseError, match="silently took"):
        OnnxRuntime.build(graph, GPU_ARMS["onnxruntime-cuda"])
