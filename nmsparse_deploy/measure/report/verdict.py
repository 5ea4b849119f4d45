"""What the report says in sentences. Every number in them is a field of the report."""

from __future__ import annotations

from typing import Any

from nmsparse_deploy.measure.report.engines import lines as engine_lines
from nmsparse_deploy.runs.wording import interval, listed, megabytes, number, plural, with_error, within

NOT_EVALUATED = "what it costs in accuracy was not measured"
NO_SPEED = "no speed-up from sparsity was measured here"


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The JSON-able summary: who, how, does it hold, what it cost, how large, what nobody checked, and `lines`."""
    quality, compliance, sizes = report["quality"], report["compliance"], report["sizes"]
    facts = {"model": report["model"]["name"], "method": report["pruning"]["method"],
             "pattern": report["pruning"]["pattern"], "layers": report["pruning"]["layers"],
             "compliance": {key: compliance[key] for key in ("checked", "failed", "ok")} if compliance else None,
             "metrics": quality["rows"] if quality else None,
             "comparison": quality["comparison"] if quality else None,
             "sizes": {"model_bytes": sizes["model_bytes"], "masks_bytes": sizes["masks_bytes"]},
             "speed": report["latency"]["verdict"] if report["latency"] else None,
             "not_checked": report["not_checked"]}
    return {**facts, "state": _state(compliance), "verdict": _verdict(report), "lines": _lines(report)}


def _state(compliance: dict[str, Any] | None) -> str:
    return "unverified" if compliance is None or not compliance["checked"] else "holds" if compliance["ok"] else "fails"


def _verdict(report: dict[str, Any]) -> str:
    clauses = (pruned_clause(report), holds_clause(report["compliance"]), cost_clause(report["quality"]),
               speed_clause(report["latency"]))
    return "; ".join(clauses) + "."


def pruned_clause(report: dict[str, Any]) -> str:
    facts, name = report["pruning"], report["model"]["name"]
    what, were = ("weight matrix", "was") if facts["layers"] == 1 else ("weight matrices", "were")
    limit = "" if facts["sparse_kernels"] else ", which no sparse tensor core runs,"
    return f"{facts['layers']:,} {what} of {name} {were} pruned to {facts['pattern']}{limit} with {facts['method']}"


def holds_clause(compliance: dict[str, Any] | None) -> str:
    if compliance is None or not compliance["checked"]:
        return "whether they hold the pattern was not checked"
    places = [place["place"] for place in compliance["places"]]
    if compliance["ok"]:
        count = plural(compliance["checked"], "tensor")
        return f"{count} checked in the {listed(places)}, and every one holds the pattern"
    wrong = [place["place"] for place in compliance["places"] if not place["ok"]]
    whole = f" and {plural(compliance['problems'], 'problem')} of whole files" if compliance["problems"] else ""
    return (f"VERIFICATION FAILED in the {listed(wrong)}: {compliance['failed']:,} of "
            f"{plural(compliance['checked'], 'checked tensor')}{whole}")


def cost_clause(quality: dict[str, Any] | None) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for row in (quality or {}).get("rows", []):
        rows.setdefault(row["label"], row)  # an evaluation puts the metric that matters most first
    if quality is None or not rows:
        return NOT_EVALUATED
    if "dense" not in rows or "pruned" not in rows:
        return listed([f"{row['metric']} of {label} is {number(row['value'])}" for label, row in rows.items()])
    dense, pruned = rows["dense"], rows["pruned"]
    text = f"{pruned['metric']} went from {number(dense['value'])} dense to {number(pruned['value'])} pruned"
    compared = comparison_text(quality["comparison"])
    return f"{text} ({compared})" if compared else text


def comparison_text(comparison: dict[str, Any] | None) -> str:
    """The paired ratio or difference with its interval, in words."""
    if comparison is None:
        return ""
    sign = "/" if comparison["kind"] == "ratio" else "−"
    value, low, high = comparison["value"], comparison["low"], comparison["high"]
    text = f"pruned {sign} dense {within(value, low, high)}"
    if low is None or high is None:
        return f"{text}, interval not measured"
    return f"{text}, 95 % interval {interval(low, high)}"


def speed_clause(latency: dict[str, Any] | None) -> str:
    if latency is None:
        return f"{NO_SPEED}, because latency was not timed"
    reason = latency["verdict"].rstrip(".")
    return f"{NO_SPEED}: {reason[:1].lower()}{reason[1:]}" if latency["where"] == "cpu" else reason


def _lines(report: dict[str, Any]) -> list[str]:
    """For the terminal."""
    lines = [f"{pruned_clause(report)}.", f"{_capital(holds_clause(report['compliance']))}."]
    quality, sizes = report["quality"], report["sizes"]
    if quality:
        values = "; ".join(f"{row['label']} {row['metric']} = {with_error(row['value'], row['standard_error'])}"
                           for row in quality["rows"])
        compared = comparison_text(quality["comparison"])
        lines.append(f"{_capital(values)}; {compared}." if compared else f"{_capital(values)}.")
    else:
        lines.append(f"{_capital(NOT_EVALUATED)}.")
    lines.append(f"Size: weights {megabytes(sizes['model_bytes'])} with their zeros stored, masks "
                 f"{megabytes(sizes['masks_bytes'])}.")
    lines.append(f"{_capital(speed_clause(report['latency']))}.")
    lines += engine_lines(report["engines"])
    missing = report["not_checked"]
    if missing:
        lines.append("Not checked here: " + "; ".join(f"{row['place']} ({row['why']})" for row in missing) + ".")
    return [" ".join(line.split()) for line in lines]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
