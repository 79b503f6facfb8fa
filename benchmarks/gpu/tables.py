"""The report's tables in markdown, from the stages' records."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
#: So many lines of failures are shown; the JSON has all.
MOST = 30


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of a markdown table; text is on the left, all else on the right."""
    if not rows:
        return ""
    left = [isinstance(x, str) for x in rows[0]]
    lines = [[_cell(x) for x in heads], ["---" if x else "---:" for x in left]]
    lines += [[_cell(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).replace("|", "\\|").replace("\n", " ")


def digits(value: float | None, unit: str = "") -> str:
    """Three digits that mean something."""
    if value is None:
        return ""
    return f"{value:,.0f}{unit}" if abs(value) >= 1000 else f"{value:.3g}{unit}"


def stages(report: Row) -> str:
    """How each stage ended."""
    rows = [
        (
            f"{number}. {stage['stage']}",
            f"missing: {stage['summary']}" if stage["status"] == "missing" else stage["status"],
            f"{stage['seconds']:.0f} of {stage['limit']:.0f}",
            "" if stage["status"] == "missing" else stage["summary"],
        )
        for number, stage in enumerate(report["stages"], 1)
    ]
    return table(("stage", "status", "seconds", "found"), rows)


def build(stage: Row) -> str:
    """What was built with what."""
    return table(("what", "which"), [(name, str(value)) for name, value in stage["facts"].items()])


def smoke(stage: Row) -> str:
    """A line a problem, with the launches that were checked, then what is wrong."""
    rows = stage["rows"]
    total, wrong = Counter(r["problem"] for r in rows), [r for r in rows if "wrong" in r]
    bad = Counter(r["problem"] for r in wrong)
    seen: dict[str, set[str]] = {}
    for row in rows:
        kinds = {kind.partition(": ")[2] for kind in row["launches"]}
        seen.setdefault(row["problem"], set()).update(kinds)
    lines = [
        (name, f"{count - bad[name]} of {count}", ", ".join(sorted(seen[name])))
        for name, count in total.items()
    ]
    failures = [
        (row["problem"], row["dtype"], f"{row['vocab']:,}", row["wrong"]) for row in wrong[:MOST]
    ]
    first = table(("problem", "right", "launches"), lines)
    second = table(("problem", "dtype", "vocab", "wrong"), failures)
    return f"{first}\n{second}" if second else first


def op_tests(stage: Row) -> str:
    """The tests that failed."""
    rows = [(row["test"], row["reason"]) for row in stage["rows"][:MOST]]
    return table(("failed", "reason"), rows)


def times(stage: Row) -> str:
    """Ops by size, then layers, then the host's time."""
    timed = [r for r in stage["rows"] if "gb_s" in r]
    sizes = list(dict.fromkeys((r["dtype"], r["rows"], r["vocab"]) for r in timed))
    cells: dict[str, dict[Any, str]] = {}
    for row in timed:
        share = f", {row['of_roof']:.0%}" if "of_roof" in row else f", {digits(row['gb_s'])} GB/s"
        at = row["dtype"], row["rows"], row["vocab"]
        cells.setdefault(row["problem"], {})[at] = f"{digits(row['ms'])}{share}"
    heads = [f"{dtype} {rows:,} x {vocab:,}" for dtype, rows, vocab in sizes]
    ops = [(name, *(found.get(size, "") for size in sizes)) for name, found in cells.items()]
    parts = [table(("ms, of the roof", *heads), ops)]
    parts.append(
        table(
            ("layer", "dtype", "ms", "TFLOP/s", "x its share of dense"),
            [
                (
                    *(r["problem"], r["dtype"], digits(r["ms"]), digits(r["tflop_s"])),
                    digits(r["over_share_of_dense"]),
                )
                for r in stage["rows"]
                if "tflop_s" in r
            ],
        )
    )
    host: dict[str, dict[bool, float]] = {}
    for row in stage["rows"]:
        if "host_us" in row:
            host.setdefault(row["problem"], {})[row["gradient"]] = row["host_us"]
    lines = [
        (name, digits(found.get(False)), digits(found.get(True))) for name, found in host.items()
    ]
    parts.append(table(("host, a call", "µs", "µs with the gradient"), lines))
    failed = [(r["problem"], r["failed"]) for r in stage["rows"] if "failed" in r]
    parts.append(table(("not timed", "why"), failed[:MOST]))
    return "\n".join(part for part in parts if part)


def counters(stage: Row) -> str:
    """A line a kernel."""
    names = list(
        dict.fromkeys(
            name
            for row in stage["rows"]
            for name in row
            if name not in ("kernel", "stalls") and not name.endswith("_unit")
        )
    )
    rows = []
    for row in stage["rows"]:
        values = []
        for name in names:
            value, unit = row.get(name), row.get(f"{name}_unit", "")
            shown = digits(value) if isinstance(value, float) else _cell(value)
            values.append(f"{shown} {unit}".strip())
        waits = ", ".join(f"{name} {digits(value)}" for name, value in row["stalls"].items())
        rows.append((row["kernel"], *values, waits))
    return table(("kernel", *names, "cycles a warp waits, an instruction"), rows)


def sanitizer(stage: Row) -> str:
    """A line a tool."""
    rows = [
        (
            *(row["tool"], row["reports"]),
            row.get("failed") or row.get("missing") or "nothing found",
            row["smoke"],
        )
        for row in stage["rows"]
    ]
    return table(("tool", "reports", "verdict", "smoke test"), rows)


def peers(stage: Row) -> str:
    """A line a contestant of each case."""
    rows = []
    for case in stage["rows"]:
        gradient = ", loss + gradient" if case["gradient"] else ""
        title = f"{case['case']}, {case['rows']:,} x {case['vocab']:,} {case['dtype']}{gradient}"
        for found in case["contestants"]:
            rows.append(
                (
                    title,
                    found["name"],
                    digits(found["median_ms"]),
                    digits(found["times_roof"]),
                    digits(found["fastkd_speedup"], " x"),
                    digits(found["peak_bytes"] and found["peak_bytes"] / 2**20),
                    found["wrong"] or found["failed"] or "",
                )
            )
            title = ""
    heads = ("case", "who", "ms", "x roof", "fastkd is faster", "peak MiB", "wrong or not run")
    return table(heads, rows)


TABLES: dict[str, Callable[[Row], str]] = {
    function.__name__: function
    for function in (build, smoke, op_tests, times, counters, sanitizer, peers)
}


def markdown(report: Row) -> str:
    """Return the whole report."""
    machine = "; ".join(f"{name}: {value}" for name, value in report["machine"].items())
    parts = [f"# fastkd on a GPU\n\n{machine}\n", stages(report)]
    for stage in report["stages"]:
        text = TABLES[stage["stage"]](stage)
        if text:
            parts.append(f"## {stage['stage']}\n\n{text}")
    return "\n".join(parts)
