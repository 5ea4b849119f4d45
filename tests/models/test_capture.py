"""What modules read and return while a model runs, and how a pass is left early."""

import pytest
import torch
from torch import nn

from nmsparse_deploy.models.capture import capture


def chain() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


def test_inputs_and_outputs_go_to_the_callbacks_of_their_paths():
    model, x, inputs, outputs = chain(), torch.randn(2, 4), [], []
    with capture(
        model,
        {"1": lambda args, named: inputs.append(args[0])},
        {"0": lambda args, output: outputs.append(output)},
    ):
        model(x)
    model(x)
    assert len(inputs) == len(outputs) == 1
    assert inputs[0] is outputs[0]


def test_what_a_callback_returns_replaces_the_output():
    model, x = chain(), torch.randn(2, 4)
    with capture(model, outputs={"2": lambda args, output: output + 1}):
        moved = model(x)
    assert torch.allclose(moved, model(x) + 1)


def test_stop_leaves_the_pass_and_the_hooks_are_gone_afterwards():
    model, ran = chain(), []
    with capture(
        model,
        {str(number): lambda args, named, number=number: ran.append(number) for number in range(3)},
        stop=lambda: ran == [0, 1],
    ):
        model(torch.randn(2, 4))
        raise AssertionError("the pass went on")
    assert ran == [0, 1]
    model(torch.randn(2, 4))
    assert ran == [0, 1]


def test_a_capture_leaves_only_its_own_pass():
    model, outer = chain(), []
    with capture(model, {"1": lambda args, named: outer.append(args)}, stop=lambda: bool(outer)):
        with capture(model, outputs={"2": lambda args, output: None}):
            model(torch.randn(2, 4))
        raise AssertionError("the inner capture swallowed the outer one's end")
    assert outer


def test_errors_pass_and_the_hooks_are_gone():
    model = chain()
    with pytest.raises(ZeroDivisionError), capture(model, {"0": lambda args, named: 1 / 0}):
        model(torch.randn(2, 4))
    model(torch.randn(2, 4))
