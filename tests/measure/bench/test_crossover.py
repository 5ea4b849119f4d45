"""From how many rows on sparse wins: the rule, the tables that `plan` reads, and what could not be
measured."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.find.plan.latency import source
from nmsparse_deploy.measure.bench.crossover import (
    NO_TIME,
    Line,
    crossover,
    first_win,
    markdown,
    parse_shape,
    plot,
    shapes_of,
    tables,
    wins,
)
from nmsparse_deploy.measure.bench.stages import write_crossover
from nmsparse_deploy.models.base import Target
from nmsparse_deploy.ship.torch_sparse.semi_structured import StandIn, standing_in
from nmsparse_deploy.system.gpu_clock import dry_machine


def line(rows: int, low: float, precision: str = "fp16", k: int = 64, n: int = 128) -> Line:
    return Line(k, n, rows, precision, 100.0, 100 / (low + 0.1), low + 0.1, low, low + 0.2)


def test_a_win_counts_from_where_it_lasts():
    assert first_win([line(16, 1.2), line(64, 0.9), line(256, 1.1), line(1024, 1.3)]) == 256
    assert first_win([line(16, 1.2), line(64, 0.9)]) is None
    assert first_win([]) is None


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=6))
def test_every_number_of_rows_from_there_on_wins_and_none_before_could_be_added(lows):
    lines = [line(2**i, low) for i, low in enumerate(lows)]
    found = first_win(lines)
    tail = [one for one in lines if found is not None and one.rows >= found]
    assert all(one.low > 1 for one in tail)
    rest = lines[: len(lines) - len(tail)]
    assert not rest or rest[-1].low <= 1


def test_a_table_is_what_plan_reads(tmp_path):
    lines = [
        line(1024, 1.2),
        line(1024, 1.4, k=64, n=64),
        line(1024, 0.7, "int8"),
        Line(8, 8, 1024, "int8", why_not="small"),
    ]
    write_crossover(lines, tmp_path, dry_machine())
    read = source("A100", None, tmp_path / "fp16.json")
    assert read.status == "measured" and read.rows == 1024
    target = Target("w", "m", 0, 1, 64, 128, "m")
    found = read.table[64, 128]
    assert (found.dense_us, found.sparse_us) == (lines[0].dense_us, lines[0].sparse_us)
    from nmsparse_deploy.pattern import TWO_FOUR

    assert read.group([target], TWO_FOUR) == found
    eight = json.loads((tmp_path / "int8.json").read_text())
    assert (
        eight["missing"] == [{"k": 8, "n": 8, "rows": 1024, "why_not": "small"}]
        and eight["dry"] is True
    )
    assert "Dry run" in (tmp_path / "crossover.md").read_text()
    assert "<svg" in (tmp_path / "crossover.svg").read_text() and not list(tmp_path.glob(".*"))


def test_shapes_are_those_of_layers_and_of_what_is_merged():
    targets = [
        Target(f"{name}.w", name, 0, 1, 64, n, "qkv")
        for name, n in (("q", 64), ("k", 32), ("v", 32))
    ]
    targets.append(Target("o.w", "o", 0, 1, 64, 64, "o"))
    assert shapes_of(targets) == {
        (64, 64): ["q.w", "o.w"],
        (64, 32): ["k.w", "v.w"],
        (64, 128): ["q.w + k.w + v.w"],
    }


def test_what_cannot_run_says_why():
    with standing_in(StandIn()):
        found = crossover([(64, 32), (24, 32)], [16], ["fp16"], dry_machine(), 5)
        late = crossover([(64, 32)], [16, 32], ["fp16"], dry_machine(), 5, until=0.0)
    assert found[0].why_not is None and found[0].speedup and "24 x 32" in found[1].why_not
    assert [one.why_not for one in late] == [NO_TIME] * 2
    assert wins(found)[1].why_not and wins(found)[0].best_rows == 16
    assert plot(late, dry_machine()) is None and NO_TIME in markdown(late, dry_machine())
    assert tables(late, dry_machine())["fp16"].to_json()["rows"] == []


@pytest.mark.parametrize("text", ("4096", "x", "0x64", "4096 x 64", "-1x4", "axb"))
def test_shapes_are_read_strictly(text):
    assert parse_shape("4096x14336") == (4096, 14336)
    with pytest.raises(UsageError, match="no shape"):
        parse_shape(text)
