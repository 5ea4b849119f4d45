"""Plans: the knapsack is exact, the constraints hold, and what was planned is what gets pruned."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_deploy.cli import app, invoke
from nmsparse_deploy.errors import NmsparseError, UsageError
from nmsparse_deploy.find.plan import file as plan_file
from nmsparse_deploy.find.plan import latency
from nmsparse_deploy.find.plan.allocation import choices, solve
from nmsparse_deploy.find.plan.knapsack import STEPS, Option, choose
from nmsparse_deploy.find.plan.latency import Latency, LatencySource, saving_for, speedup
from nmsparse_deploy.find.plan.make_plan import PlanRow, make_plan
from nmsparse_deploy.find.plan.mixed_ratios import mixed_ratios
from nmsparse_deploy.find.plan.sensitivity import LossIncrease
from nmsparse_deploy.models.base import Discovery, Target
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.recipe import Allocate, Prune, fingerprint, validate
from nmsparse_deploy.runs.run_dir import RunDir

# --- the knapsack
# ----------------------------------------------------------------------------------------------------

amounts = st.floats(0, 10).map(lambda x: round(x, 3))
whole = st.integers(0, 40).map(float)


def items(weights: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[Option]]]:
    option = st.builds(Option, st.floats(-5, 5), weights)
    return st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=6)


def brute_force(table: list[list[Option]], capacity: float) -> float | None:
    sums = [
        sum(o.value for o in chosen)
        for chosen in itertools.product(*table)
        if sum(o.weight for o in chosen) <= capacity * (1 + 1e-12)
    ]
    return max(sums, default=None)


@given(items(whole), st.integers(0, 120))
def test_whole_weights_are_solved_exactly(table, capacity):
    found, best = choose(table, capacity), brute_force(table, capacity)
    assert (found is None) == (best is None)
    if found is not None:
        chosen = [options[index] for options, index in zip(table, found)]
        assert sum(o.weight for o in chosen) <= capacity
        assert sum(o.value for o in chosen) == pytest.approx(best, abs=1e-9)


@given(items(amounts), st.floats(0.01, 30))
def test_other_weights_hold_the_constraint_and_lose_no_more_than_the_resolution(table, capacity):
    found, best = choose(table, capacity), brute_force(table, capacity)
    least = brute_force(table, capacity * (1 - len(table) / STEPS))
    assert best is not None or found is None
    if found is None:
        assert least is None
        return
    chosen = [options[index] for options, index in zip(table, found)]
    assert sum(o.weight for o in chosen) <= capacity * (1 + 1e-9)
    value = sum(o.value for o in chosen)
    assert value <= best + 1e-9 and (least is None or value >= least - 1e-9)


def test_of_equal_values_the_lighter_wins():
    assert choose([[Option(1, 3), Option(1, 2)], [Option(0, 1), Option(0, 0)]], 10) == [1, 1]
    assert choose([[Option(0, 5)]], 4) is None and choose([], 1) == []


def test_hundreds_of_groups():
    table = [
        [Option(0, 0), Option(1 + number % 7, 0.01 * (1 + number % 11))] for number in range(400)
    ]
    found = choose(table, 5.0)
    assert sum(options[index].weight for options, index in zip(table, found)) <= 5.0


# --- the constraints
# ---------------------------------------------------------------------------------------------------


def target(
    name: str = "a", k: int = 64, n: int = 64, fusion: str | None = None, block: int = 0
) -> Target:
    return Target(f"{name}.weight", name, block, 1, k, n, fusion or name)


@st.composite
def problems(draw) -> list:
    groups = []
    for number in range(draw(st.integers(1, 6))):
        k = 64 * draw(st.integers(1, 4))
        row = PlanRow(target(f"layer{number}", k), TWO_FOUR, "selected")
        dense = draw(st.floats(1, 10))
        found = Latency(dense, dense * draw(st.floats(0.5, 1.1)))
        groups.append(
            choices(
                [row],
                [TWO_FOUR],
                [LossIncrease(draw(st.floats(-0.05, 0.3)), 0.0)],
                [found],
                dense=True,
            )
        )
    return groups


def subsets(groups) -> list[tuple[float, float, int]]:
    """(sum of rises, saving, zeros) of every way to prune."""
    return [
        (sum(c.cost for c in way), sum(c.saving_us for c in way), sum(c.zeros for c in way))
        for way in itertools.product(*(group.choices for group in groups))
    ]


def sums(chosen) -> tuple[float, float, int]:
    return (
        sum(c.cost for c in chosen),
        sum(c.saving_us for c in chosen),
        sum(c.zeros for c in chosen),
    )


SHARE = 0.7


def solved(groups, **constraint):
    weights = sum(group.weights for group in groups)
    return solve(groups, Allocate(**constraint), SHARE, weights), weights


@given(problems(), st.floats(0.02, 0.6))
def test_within_a_rise_of_perplexity_the_most_time_is_won(groups, increase):
    room = math.log1p(increase)
    ways = [
        saving for rise, saving, _ in subsets(groups) if rise <= room * (1 - len(groups) / STEPS)
    ]
    try:
        chosen, _ = solved(groups, max_ppl_increase=increase)
    except NmsparseError as error:
        assert error.exit_code == 1 and max(ways) <= 1e-9
        return
    rise, saving, _ = sums(chosen)
    assert rise <= room * (1 + 1e-9) and saving >= max(ways) - 1e-9


@given(problems(), st.floats(1.01, 1.4))
def test_a_speed_up_is_reached_with_the_least_rise(groups, wanted):
    dense = sum(group.dense_us for group in groups)
    need = saving_for(SHARE, dense, wanted)
    ways = [rise for rise, saving, _ in subsets(groups) if saving >= need - 1e-9 * dense]
    try:
        chosen, _ = solved(groups, min_speedup=wanted)
    except NmsparseError as error:
        reach = speedup(SHARE, dense, max(saving for _, saving, _ in subsets(groups)))
        assert error.exit_code == 1 and f"{reach:.4f}" in error.message and reach <= wanted + 1e-9
        return
    rise, saving, _ = sums(chosen)
    assert speedup(SHARE, dense, saving) >= wanted - 1e-9
    strict = [
        rise for rise, saving, _ in subsets(groups) if saving >= need + len(groups) / STEPS * dense
    ]
    assert min(ways) - 1e-9 <= rise and (not strict or rise <= min(strict) + 1e-9)


@given(problems(), st.floats(0.01, 1))
def test_a_budget_is_reached_with_the_least_rise(groups, budget):
    chosen, weights = solved(groups, budget=budget)
    rise, _, zeros = sums(chosen)
    assert zeros >= budget * weights / 2
    assert rise == pytest.approx(
        min(r for r, _, z in subsets(groups) if z >= budget * weights / 2), abs=1e-9
    )


def test_a_constraint_that_cannot_be_met_says_the_best_that_can():
    row = PlanRow(target(), TWO_FOUR, "selected")
    group = choices([row], [TWO_FOUR], [LossIncrease(0.1, 0.0)], [Latency(2.0, 1.0)], dense=True)
    with pytest.raises(NmsparseError, match=r"alone costs 10.52%") as caught:
        solve([group], Allocate(max_ppl_increase=0.01), SHARE, group.weights)
    assert caught.value.exit_code == 1 and caught.value.hint == "--max-ppl-increase 0.1052"
    assert solve([group], Allocate(max_ppl_increase=0.1052), SHARE, group.weights)[0].pattern
    with pytest.raises(NmsparseError, match=r"2 times as fast.*reach 1.5385"):
        solve([group], Allocate(min_speedup=2), SHARE, group.weights)
    with pytest.raises(NmsparseError, match=r"prunes 60.0%.*only 50.0%"):
        solve([group], Allocate(budget=0.6), SHARE, 2 * group.weights)


def test_patterns_without_kernels_are_judged_by_their_zeros():
    groups = [
        choices(
            [PlanRow(target(name, k), NMPattern(4, 8), "selected")],
            [NMPattern(4, 8)],
            [LossIncrease(rise, 0.0)],
            [Latency(1.0, 1.0)],
            dense=True,
        )
        for name, k, rise in (("a", 64, 0.05), ("b", 256, 0.05))
    ]
    chosen = solve(groups, Allocate(max_ppl_increase=0.06, pattern="4:8"), SHARE, 320 * 64)
    assert [choice.zeros for choice in chosen] == [0, 128 * 64]


@pytest.mark.parametrize(
    "fields,sentence",
    [
        ({}, "exactly one"),
        ({"budget": 0.5, "min_speedup": 1.2}, "exactly one"),
        ({"min_speedup": 1.2, "vary_keep": True}, "vary-keep"),
        ({"max_ppl_increase": 0.1, "estimator": "hutchinson"}, "direct estimator"),
        ({"pattern": "unstructured:0.5", "budget": 0.5}, "leave the others out"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.5, "method": "wnada"}, "Did you mean 'wanda'"),
    ],
)
def test_bad_constraints_are_usage_errors(fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        validate(Allocate, fields)


# --- latencies
# ---------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1), st.floats(0.1, 1e4), st.floats(0, 0.99))
def test_amdahl_there_and_back(share, dense, part):
    gained = speedup(share, dense, part * dense)
    assert 1 <= gained <= 1 / (1 - share * part) + 1e-9
    if gained > 1:
        assert saving_for(share, dense, gained) == pytest.approx(
            part * dense, rel=1e-6, abs=1e-6 * dense
        )


def table(path: Path, *rows: tuple) -> Path:
    names = ("k", "n", "rows", "dense_us", "sparse_us")
    path.write_text(
        json.dumps({"gpu": "Test GPU", "rows": [dict(zip(names, row)) for row in rows]})
    )
    return path


def test_a_measured_table_knows_merged_shapes_and_single_members(tmp_path):
    q, k = target("q", 64, 96, "q"), target("k", 64, 32, "q")
    read = latency.source(
        "A100", None, table(tmp_path / "t.json", (64, 128, 512, 10, 6), (64, 96, 512, 8, 5))
    )
    assert (read.status, read.gpu, read.rows) == ("measured", "Test GPU", 512)
    assert read.group([q, k], TWO_FOUR) == Latency(10, 6)
    assert read.group([q], TWO_FOUR) == Latency(8, 5)
    assert read.group([q, k], NMPattern(4, 8)).saving_us == 0  # no kernel runs it
    assert read.group([q, k], NMPattern(1, 4)).saving_us == 4  # 1:4 runs as 2:4
    with pytest.raises(UsageError, match=r"no row for k=64, n=32 at 512 rows"):
        read.group([k], TWO_FOUR)
    apart = latency.source(
        "", None, table(tmp_path / "u.json", (64, 32, 512, 3, 2), (64, 96, 512, 8, 5))
    )
    assert apart.group([q, k], TWO_FOUR) == Latency(11, 7)
    odd = latency.source("", None, table(tmp_path / "o.json", (36, 96, 512, 3, 1)))
    assert odd.group([target("o", 36, 96)], TWO_FOUR).saving_us == 0  # ineligible by shape
    with pytest.raises(UsageError, match="512 rows"):
        latency.source("", 64, tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"k": 1}]}', '{"rows": 3}', "\x00"])
def test_what_is_no_table(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match="latency table"):
        latency.source("A100", None, tmp_path / "t.json")
    with pytest.raises(UsageError, match="no latency table"):
        latency.source("A100", None, tmp_path / "none.json")
    with pytest.raises(UsageError, match="not a positive"):
        latency.source("A100", None, table(tmp_path / "t.json", (1, 1, 1, 1, -1)))


def test_the_roofline_stands_in():
    found = latency.source("h100")
    assert (found.status, found.gpu, found.rows) == ("predicted", "H100 SXM", latency.ROWS)
    saved = found.group([target("a", 4096, 4096)], TWO_FOUR)
    assert saved.sparse_us == pytest.approx(saved.dense_us / 2)
    with pytest.raises(UsageError, match="no figures for the GPU 'Voodoo'"):
        latency.source("Voodoo")
    assert isinstance(found, LatencySource)


# --- MixGPT's ratios
# -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=30), st.floats(0.1, 0.9), st.floats(0, 0.1))
def test_mixed_ratios(values, ratio, alpha):
    found = mixed_ratios(values, ratio, alpha)
    assert sum(found) / len(found) == pytest.approx(ratio)
    assert all(ratio - alpha - 1e-9 <= r <= ratio + alpha + 1e-9 for r in found)
    ranked = [r for _, _, r in sorted(zip(values, range(len(values)), found))]
    assert ranked == sorted(found, reverse=True)
    if len(values) > 1:
        assert max(found) == pytest.approx(ratio + alpha) and min(found) == pytest.approx(
            ratio - alpha
        )
        steps = [a - b for a, b in itertools.pairwise(ranked)]
        assert steps == pytest.approx([2 * alpha / (len(values) - 1)] * len(steps), abs=1e-9)


def test_mixed_ratios_drift_when_sizes_differ_and_refuse_what_is_no_density():
    small, large = mixed_ratios([1.0, 2.0], 0.5, 0.1)
    assert (small * 1 + large * 3) / 4 == pytest.approx(0.45)
    with pytest.raises(UsageError):
        mixed_ratios([1.0], 0.05, 0.1)


# --- from the plan to the pruned model
# -----------------------------------------------------------------------------------

FOUND = Discovery(
    ("b.0",), (target("q", fusion="q"), target("k", fusion="q"), target("o", k=30)), ()
)


def test_named_decisions_keep_groups_whole_and_say_why():
    q, k = "q.weight", "k.weight"
    plan = make_plan(
        Discovery(FOUND.blocks, (*FOUND.targets, target("x")), ()),
        NMPattern(2, 4),
        patterns={k: "dense: too dear"},
    )
    assert [row.reason for row in plan.rows] == [
        "reads the same input as k.weight, which stays dense",
        "kept dense by plan: too dear",
        "reduction length 30 is not divisible by 4",
        "selected",
    ]
    mixed = make_plan(FOUND, TWO_FOUR, patterns={q: "4:8", k: "4:8"})
    assert [str(row.pattern) for row in mixed.pruned()] == ["4:8", "4:8"]
    assert {row.reason for row in mixed.pruned()} == {"selected by plan"}
    for patterns, sentence in (
        ({"z.weight": "2:4"}, "no prunable parameter"),
        ({"o.weight": "2:4"}, "divisible"),
        ({q: "4:8"}, "merged into one GEMM"),
    ):
        with pytest.raises(UsageError, match=sentence):
            make_plan(FOUND, TWO_FOUR, patterns=patterns)
    with pytest.raises(UsageError, match="not a pattern"):
        validate(Prune, {"patterns": {q: "4:2"}})


def test_recipes_without_decisions_keep_their_identity():
    assert (
        fingerprint("m", Prune())
        == fingerprint("m", Prune(patterns=None))
        != fingerprint("m", Prune(patterns={"a": "dense"}))
    )


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    code = invoke(lambda: app([str(a) for a in arguments]))
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def small(llama_dir, texts) -> list[object]:
    return [llama_dir, "--data", texts["calibration"], "--samples", 3, "--length", 32]


def saved(code: int, out: str) -> dict:
    assert code == 0, out
    return json.loads(out)


def test_the_three_constraints_on_the_command_line(small, capfd, tmp_path):
    half = saved(*run(capfd, "--json", "plan", *small, "--budget", 0.5)[:2])
    assert half["totals"]["share_pruned"] >= 0.5 and half["totals"]["status"] == "predicted"
    assert (
        half["latency"]["status"] == "predicted"
        and len(half["patterns"]) == 14
        and len(half["groups"]) == 8
    )
    fast = saved(*run(capfd, "--json", "plan", *small, "--min-speedup", 1.002, "--gpu", "H100")[:2])
    assert fast["totals"]["speedup"] >= 1.002 and fast["latency"]["gpu"] == "H100 SXM"
    good = saved(*run(capfd, "--json", "plan", *small, "--max-ppl-increase", 0.05)[:2])
    assert good["totals"]["ppl_increase"] <= 0.05 and good["totals"]["groups_pruned"] > 0
    for plan in (half, fast, good):
        for group in plan["groups"]:
            assert len({plan["patterns"][name].partition(":")[0] for name in group["members"]}) == 1
            assert (
                group["pattern"] == "2:4" or "sensitivity" in plan["patterns"][group["members"][0]]
            )
    measured = table(
        tmp_path / "t.json",
        *((k, n, 256, 10, 5) for k, n in ((64, 128), (64, 64), (64, 256), (128, 64))),
    )
    code, out, _ = run(capfd, "plan", *small, "--min-speedup", 1.3, "--latency-table", measured)
    assert (
        code == 0
        and "measured GEMM times of Test GPU at 256 rows" in out
        and "q_proj, k_proj, v_proj" in out
    )


def test_constraints_that_cannot_be_met_and_bad_flags(small, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, "plan", *small, "--min-speedup", 3)
    assert (
        code == 1
        and "No plan makes the model 3 times as fast" in err
        and err.count("Error") == 1
        and not out
    )
    code, _, err = run(capfd, "plan", *small, "--budget", 1, "--exclude", "*down_proj*")
    assert code == 1 and "only 77.8% of them may get 2:4" in err
    for flags, sentence in (
        ([], "exactly one"),
        (["--budget", 0.5, "--min-speedup", 1.2], "exactly one"),
        (["--budget", 0.5, "--gpu", "Voodoo"], "no figures"),
        (["--budget", 0.5, "--out", "plan.txt"], "neither YAML nor JSON"),
        (["--budget", 0.5, "--estimator", "magic"], "estimator"),
        (["--budget", 0.5, "--vary-keep", "--pattern", "1:2"], "no neighbours"),
        (["--min-speedup", 1.2, "--latency-table", "no.json"], "no latency table"),
    ):
        code, _, err = run(capfd, "plan", *small, *flags)
        assert code == 2 and sentence in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_what_was_planned_is_what_gets_pruned(name, small, texts, capfd, tmp_path):
    file = tmp_path / name
    options = (
        ["--min-speedup", 1.002]
        if name.endswith("yaml")
        else ["--budget", 0.4, "--estimator", "hutchinson", "--probes", 2]
    )
    assert run(capfd, "plan", *small, *options, "--out", file)[0] == 0
    planned = plan_file.load(file)
    full = yaml.safe_load(file.read_text())
    code, out, err = run(
        capfd, "prune", small[0], "--plan", file, "--method", "magnitude", "--out", tmp_path / "run"
    )
    assert code == 0 and "as planned" in out, err
    opened = RunDir.open(tmp_path / "run")
    rows = opened.read_json("plan.json")["rows"]
    assert {row["name"]: row["pattern"] or "dense" for row in rows} == {
        name: text.partition(": ")[0] if text.startswith("dense") else text
        for name, text in planned.patterns.items()
    }
    dense = [row["reason"] for row in rows if not row["pattern"]]
    assert dense and all(
        "kept dense by plan: sensitivity" in reason and "gain" in reason for reason in dense
    )
    assert len(opened.read_json("layers.json")) == 14 - len(dense)
    assert full["totals"]["groups_pruned"] == len(
        [g for g in full["groups"] if g["pattern"] != "dense"]
    )
    assert opened.manifest().recipe.patterns == planned.patterns


def test_plans_that_do_not_fit(small, capfd, tmp_path):
    file = tmp_path / "plan.json"
    plan_file.save({"model": "m", "pattern": "2:4", "patterns": {"nowhere.weight": "2:4"}}, file)
    code, _, err = run(capfd, "prune", small[0], "--plan", file, "--out", tmp_path / "run")
    assert code == 2 and "no prunable parameter" in err and not (tmp_path / "run").exists()
    code, _, err = run(capfd, "prune", small[0], "--plan", file, "--pattern", "1:4")
    assert code == 2 and "leave --pattern out" in err
    for text in ("", "[1]", "{}", '{"patterns": []}', "{"):
        file.write_text(text)
        code, _, err = run(capfd, "prune", small[0], "--plan", file)
        assert code == 2 and "is not a plan" in err
    assert run(capfd, "prune", small[0], "--plan", tmp_path / "none.yaml")[0] == 2


def test_keep_may_vary_around_a_mean_density(small, capfd, tmp_path):
    file = tmp_path / "plan.yaml"
    code, out, _ = run(
        capfd, "plan", *small, "--budget", 1, "--vary-keep", "--pattern", "4:8", "--out", file
    )
    assert code == 0 and "gain no time on hardware" in out
    plan = yaml.safe_load(file.read_text())
    assert plan["totals"]["mean_density"] <= 0.5 and plan["totals"]["speedup"] == 1
    assert {g["pattern"] for g in plan["groups"]} <= {"3:8", "4:8", "5:8"}
    assert (
        run(
            capfd,
            "prune",
            small[0],
            "--plan",
            file,
            "--method",
            "magnitude",
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    kept = {
        row["name"]: row["pattern"]
        for row in RunDir.open(tmp_path / "run").read_json("layers.json")
    }
    assert kept == plan["patterns"]


@pytest.mark.parametrize("estimator", ["direct", "hutchinson"])
def test_every_matrix_gets_a_share_of_zeros_by_its_sensitivity(estimator, small, capfd, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run(
        capfd,
        "plan",
        *small,
        "--pattern",
        "unstructured:0.5",
        "--spread",
        0.2,
        "--estimator",
        estimator,
        "--probes",
        2,
        "--out",
        file,
    )
    assert code == 0 and "14 of 14 matrices" in out and "gain no time on hardware" in out
    groups = json.loads(file.read_text())["groups"]
    ratios = [float(group["pattern"].partition(":")[2]) for group in groups]
    ranked = [ratio for _, ratio in sorted(zip([group["sensitivity"] for group in groups], ratios))]
    assert (
        ranked == sorted(ratios, reverse=True)
        and ranked[0] == pytest.approx(0.7)
        and sum(ratios) == pytest.approx(7)
    )
    assert (
        run(
            capfd,
            "prune",
            small[0],
            "--plan",
            file,
            "--method",
            "magnitude",
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    for row in RunDir.open(tmp_path / "run").read_json("layers.json"):
        group = next(group for group in groups if row["name"] in group["members"])
        assert row["pattern"] == group["pattern"]


def test_a_report_names_the_patterns_that_are_there(small, capfd, tmp_path):
    """And sends the reader to the recipe, because no option holds a plan's decisions."""
    file, where = tmp_path / "plan.json", tmp_path / "run"
    patterns = {
        "model.layers.0.mlp.down_proj.weight": "1:4",
        "model.layers.1.mlp.down_proj.weight": "dense",
    }
    plan_file.save({"model": "m", "pattern": "2:4", "patterns": patterns}, file)
    assert (
        run(capfd, "prune", small[0], "--plan", file, "--method", "magnitude", "--out", where)[0]
        == 0
    )
    assert run(capfd, "report", where)[0] == 0
    text = (where / "report" / "report.md").read_text()
    assert "13 weight matrices" in text and "pruned to 1:4, 2:4 with" in text
    assert "recipe.yaml" in text and "kept dense by plan" in text
