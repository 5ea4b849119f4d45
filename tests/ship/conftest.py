from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nmsparse_deploy.ship.tensorrt import engine as runtime
from tests.fixtures import fake_tensorrt


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU; tensors stay in ordinary memory."""

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    stream = type("Stream", (), {"cuda_stream": 0, "synchronize": lambda self: None})
    properties = SimpleNamespace(name="Fake GPU", major=9, minor=0)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Stream": stream,
        "get_device_properties": lambda device: properties,
        "stream": lambda s: nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: nullcontext(),
        "get_device_name": lambda *a: "Fake GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runtime, "DEVICE", "cpu")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, cuda: None) -> Callable[..., ModuleType]:
    """Put a fake TensorRT of a major version in place; its kernels are what the profiler sees."""

    def put(major: int, **options) -> ModuleType:
        trt = fake_tensorrt.make(major, **options)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)

        class Recorded:
            def __init__(self, activities):
                self.start = len(trt.ran)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

            def events(self):
                device = torch.autograd.DeviceType
                seen = [
                    SimpleNamespace(name=name, device_type=device.CUDA)
                    for name in trt.ran[self.start :]
                ]
                return [*seen, SimpleNamespace(name="cudaLaunchKernel", device_type=device.CPU)]

        monkeypatch.setattr(torch.profiler, "profile", Recorded)
        return trt

    return put
