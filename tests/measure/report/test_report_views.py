import json
import re
from itertools import combinations

import pytest

from nmsparse_deploy.measure.report import plots
from nmsparse_deploy.measure.report.build import build_report, summary
from nmsparse_deploy.measure.report.views import Page, html, markdown
from nmsparse_deploy.runs.section import (
    Bullets,
    Cell,
    Code,
    Facts,
    Figure,
    Fold,
    Graphic,
    Paragraph,
    Section,
    Table,
    columns,
)
from tests.fixtures.run_folder import (
    STAGES,
    make_run,
    views,
    write_bench,
    write_evaluate,
    write_verify,
)
from tests.fixtures.run_folder import Page as HtmlPage

HOSTILE = "<script>alert('x')</script>\"' onload=\"evil()\" & | `code` $\\frac$ ](http://evil.example) \x07 {{ 7*7 }}"
DRAWN: dict[tuple[str, str], str] = {}
LEAK = re.compile(r"\bNone\b|\bnan\b|\binf\b|\bundefined\b|Infinity|Traceback")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.fixture
def plots_once(monkeypatch):
    """Runs of different stages share their plots: draw each once."""
    draw = plots._svg

    def drawn(axes, size, label, salt):
        if (label, salt) not in DRAWN:
            DRAWN[label, salt] = draw(axes, size, label, salt)
        return DRAWN[label, salt]

    monkeypatch.setattr(plots, "_svg", drawn)


def built(run):
    page = build_report(run)
    assert page == run / "report/index.html"
    return views(run)


def shows(text, value, within=0.006):
    """Is the value among the numbers of the text, to the last digit that the text gives and
    `within` its size?"""
    for token in NUMBER.findall(text):
        digits, _, power = token.replace(",", "").partition("e")
        last = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
        shown = float(token.replace(",", ""))
        if abs(shown - value) <= 0.5001 * last and abs(shown - value) <= within * abs(value):
            return True
    return False


SUBSETS = [subset for size in range(len(STAGES) + 1) for subset in combinations(STAGES, size)]


@pytest.mark.parametrize("stages", SUBSETS, ids=lambda subset: "+".join(subset) or "pruned only")
def test_every_combination_of_stages_gives_three_sound_views(tmp_path, stages, plots_once):
    run = make_run(tmp_path / "run", stages)
    html, markdown, data = built(run)
    page = HtmlPage(html)
    assert not LEAK.search(page.text) and not LEAK.search(markdown)
    assert data["headline"] == json.loads(json.dumps(summary(run).to_json()))
    missing = {row["place"] for row in data["not_checked"]}
    assert (
        ("accuracy" in missing)
        == ("evaluate" not in stages)
        == ("Accuracy was not measured" in page.text)
    )
    assert (
        ("latency" in missing)
        == ("bench" not in stages)
        == ("Latency was not measured" in page.text)
    )
    assert ("pattern" in missing) == ("verify" not in stages)
    assert data["headline"]["state"] == ("holds" if "verify" in stages else "unverified")
    assert "no speed-up from sparsity was measured here" in data["headline"]["verdict"]
    for line in (data["headline"]["verdict"], *(f"{row['why']}" for row in data["not_checked"])):
        assert line in page.text


def test_numbers_of_the_views_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    html, markdown, data = built(run)
    evaluated, bench = run.read_json("evaluate.json"), run.read_json("bench.json")
    rows = {row["label"]: row for row in data["quality"]["rows"]}
    arms = {arm["name"]: arm for arm in data["latency"]["arms"]}
    numbers = [
        data["sizes"]["model_bytes"],
        (run / "masks.safetensors").stat().st_size,
        765432 + 1234,
        0.000123,
        2.5e-06,
    ]
    for label, result in evaluated["results"].items():
        assert (
            rows[label]["value"] == result["value"]
            and rows[label]["protocol"] == result["protocol"]
        )
        numbers += [result["value"], result["standard_error"]]
    assert data["quality"]["comparison"] == {
        "kind": "ratio",
        "value": evaluated["ratio"]["ratio"],
        "low": evaluated["ratio"]["low"],
        "high": evaluated["ratio"]["high"],
    }
    for arm in bench["arms"]:
        assert all(
            arms[arm["name"]][key] == arm[key] for key in ("median_ms", "p10_ms", "p90_ms", "calls")
        )
        numbers += [arm["median_ms"]]
    ratios = [
        *evaluated["ratio"].values(),
        *(speed["speedup"] for speed in bench["ratios"].values()),
    ]
    assert data["sizes"]["model_bytes"] == 123_456
    for layer in run.read_json("layers.json"):
        numbers.append(layer["relative_error"])
    for text in (HtmlPage(html).text, markdown.replace("\\", "")):
        assert [value for value in numbers if not shows(text, value)] == []
        assert [
            value for value in ratios if not shows(text, value, 0.06)
        ] == []  # as exact as their intervals


def test_strings_from_files_stay_text(tmp_path):
    names = [f"blocks.0.{HOSTILE}.weight", "blocks.0.$x_$.weight"]
    run = make_run(
        tmp_path / "run",
        ("export",),
        model=f"dir/{HOSTILE.replace('/', '')}",
        names=names,
        skipped=HOSTILE,
    )
    write_verify(run, bad=3, why=HOSTILE)
    write_evaluate(run, texts=(HOSTILE, HOSTILE))
    write_bench(run, ("dense", HOSTILE))
    html, markdown, _ = built(run)
    page = HtmlPage(html)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>\"' onload=\"evil()\" &" in page.text
    assert "{{ 7*7 }}" in page.text and "\x07" not in html
    outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<(?!br>)", outside_code)
    assert "](http" not in outside_code and "\\`code\\`" in outside_code


def test_every_block_of_a_section_is_escaped_on_both_pages():
    blocks = (
        Paragraph(HOSTILE),
        Bullets(((HOSTILE, HOSTILE),)),
        Code(HOSTILE),
        Facts(((HOSTILE, HOSTILE),)),
        Table(HOSTILE, columns(HOSTILE, "b"), ((HOSTILE, Cell(HOSTILE, "bad")),), HOSTILE),
        Figure((Graphic("iVBORw0KGgo=", HOSTILE, "png"),), HOSTILE),
    )
    page = Page(
        HOSTILE,
        HOSTILE,
        (Section(HOSTILE, (*blocks, Fold(HOSTILE, blocks), Section(HOSTILE, blocks))),),
        HOSTILE,
    )
    written = HtmlPage(html(page))
    assert "script" not in written.tags and not [
        name for _, name, _ in written.attributes if name.startswith("on")
    ]
    assert written.text.count("<script>alert('x')</script>") >= 30
    text = "\n".join(line for line in markdown(page).splitlines() if not line.startswith("    "))
    assert (
        text.count("alert") >= 30
        and not re.search(r"(?<!\\)<(?!br>)", text)
        and "](http" not in text
    )


def test_a_fold_for_the_page_alone_is_named_in_markdown():
    page = Page(
        "t", "s", (Section("s", (Fold("Rows", (Paragraph("one by one"),), page_only=True),)),), "f"
    )
    assert "one by one" in html(page) and "one by one" not in markdown(page)
    assert "Rows: on the HTML page and in report.json." in markdown(page)


def test_every_table_row_in_markdown_has_the_cells_of_its_head(tmp_path):
    run = make_run(tmp_path / "run", names=["blocks.0.a|b.weight", "blocks.1.c.weight"])
    _, markdown, _ = built(run)
    cells = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            cells = None
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        cells = cells or count
        assert count == cells, line


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    html, _, _ = built(make_run(tmp_path / "run"))
    page = HtmlPage(html)
    assert "script" not in page.tags and "link" not in page.tags
    targets = [
        value or ""
        for _, name, value in page.attributes
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert targets and all(value.startswith(("#", "data:image/png;base64,")) for value in targets)
    assert not re.search(r"url\((?!#)|@import|https?://", html)


def test_ids_in_the_page_are_unique_and_references_resolve(tmp_path):
    page = HtmlPage(built(make_run(tmp_path / "run"))[0])
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {
        value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")
    }
    used |= {
        found
        for _, name, value in page.attributes
        if name == "clip-path"
        for found in re.findall(r"#(\w+)", value)
    }
    assert used and used <= set(ids)


def test_every_plot_has_a_name_and_tables_scroll_inside_their_box(tmp_path):
    html, _, _ = built(make_run(tmp_path / "run"))
    found = re.findall(r"<svg [^>]*>", html)
    assert len(found) == 6 and all(
        'role="img"' in plot and re.search('aria-label="[^"]{30,}"', plot) for plot in found
    )
    assert html.count("<table") == len(re.findall(r'<div class="scroll"[^>]*>\s*<table', html))


def test_a_page_of_many_layers_stays_below_a_megabyte(tmp_path):
    names = [f"model.layers.{n // 7}.self_attn.projection_{n % 7}.weight" for n in range(210)]
    run = make_run(tmp_path / "run", names=names)
    verify = run.read_json("verify.json")
    run.write_json("verify.json", {**verify, "reports": [*verify["reports"], verify["reports"][1]]})
    html, _, data = built(run)
    assert data["compliance"]["checked"] == 630 and len(html.encode()) < 1_000_000


def test_building_again_replaces_the_report(tmp_path):
    run = make_run(tmp_path / "run", ())
    built(run)
    write_evaluate(run)
    html, _, _ = built(run)
    assert "token_ppl@16" in html


def test_pictures_are_embedded_and_only_pictures(tmp_path):
    import base64
    import json

    from nmsparse_deploy.errors import UsageError
    from nmsparse_deploy.measure.report.build import build_report

    run = make_run(tmp_path / "run")
    file = run / "evaluate.json"
    data = json.loads(file.read_text())
    png = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
    file.write_text(json.dumps({**data, "images": [{"title": "a <dog>", "png_base64": png}]}))
    page = build_report(run).read_text()
    assert f'src="data:image/png;base64,{png}" alt="a &lt;dog&gt;"' in page
    assert "- a " in (run / "report" / "report.md").read_text()
    for bad in ('"><script>', base64.b64encode(b"GIF89a").decode()):
        file.write_text(json.dumps({**data, "images": [{"title": "x", "png_base64": bad}]}))
        with pytest.raises(UsageError, match=r"evaluate.json.*damaged"):
            build_report(run)
