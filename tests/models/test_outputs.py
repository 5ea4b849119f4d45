"""One answer to what a model's output is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.outputs import primary_output

A, B = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("outputs", "name", "value", "kind"),
    [
        (A, "output", A, "features"),
        ((B, A), "output", B, "features"),
        (SimpleNamespace(last_hidden_state=B, logits=A), "logits", A, "logits"),
        (SimpleNamespace(logits=None, last_hidden_state=B), "last_hidden_state", B, "features"),
        ({"sample": A}, "sample", A, "features"),
    ],
)
def test_the_output_is_found_in_what_a_library_returns(outputs, name, value, kind):
    found = primary_output(outputs)
    assert found.name == name and found.value is value and found.kind == kind


def test_a_field_can_be_asked_for():
    assert primary_output({"logits": A, "extra": B}, "extra").value is B
    with pytest.raises(NmsparseError, match="no 'extra'"):
        primary_output({"logits": A}, "extra")


@pytest.mark.parametrize("outputs", [{}, (), None, SimpleNamespace(loss=A)])
def test_no_tensor_is_refused(outputs):
    with pytest.raises(NmsparseError, match="'logits' or 'last_hidden_state' or 'sample'"):
        primary_output(outputs)
