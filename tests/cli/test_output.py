"""Progress in a log: a line now and then, never one for every tensor."""

from __future__ import annotations

import time

from nmsparse_deploy.cli.output import Output


def test_a_log_says_every_few_seconds_how_far_it_is(monkeypatch, capsys):
    clock = iter([100.0, 100.0, 101.0, 104.9, 105.1, 105.1])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, 200.0))
    output = Output()
    for done in range(4):
        output.progress(f"verifying tensor {done}", done, 4)
    output.progress("writing the report")
    output.progress("writing the report")
    assert capsys.readouterr().err.splitlines() == [
        "verifying tensor 0 [0/4]",
        "verifying tensor 3 [3/4]",
        "writing the report",
    ]
