"""Weights whose shape no sparse tensor core takes are named by every verb that makes or checks them."""

import json

from tests.cli.test_cli import run
from tests.fixtures import pico


def test_prune_export_and_verify_name_ineligible_shapes(tmp_path, capfd):
    model = pico.save(pico.llama(intermediate_size=72), tmp_path / "odd")
    out = tmp_path / "run"
    odd = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}  # K is 72
    odd |= {f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("gate", "up")}
    for command in (
        ["prune", model, "--method", "magnitude", "--out", out],
        ["export", out, "--precision", "fp32"],
        ["verify", out],
    ):
        code, text, _ = run(capfd, *command)
        line = next(line for line in text.splitlines() if "sparse tensor cores" in line)
        assert code == 0 and "6 of these weights by shape" in line
        assert set(line.split("): ")[1].split(", ")) == odd
    code, text, _ = run(capfd, "--json", "prune", model, "--method", "magnitude", "--out", out)
    assert code == 0 and set(json.loads(text)["ineligible_by_shape"]) == odd


def test_nothing_is_said_when_every_shape_fits(tmp_path, capfd):
    model = pico.save(pico.llama(), tmp_path / "even")
    _, text, _ = run(capfd, "prune", model, "--method", "magnitude", "--out", tmp_path / "run")
    assert "sparse tensor cores" not in text
