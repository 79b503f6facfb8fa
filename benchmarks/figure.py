"""The picture: for each case, how far every contestant is from the memory roof."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import OURS, CaseResult, Measurement
from benchmarks.measure import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    OURS: "#d1495b",
    "eager": "#8d99ae",
    "F.kl_div": "#8d99ae",
    "torch.compile": "#4a4e69",
    "liger": "#00798c",
    "torchtune": "#edae49",
}
OTHER_COLOUR = "#6c757d"
#: Below this the roof is the overhead of a call, and a multiple of it says nothing about memory.
SMALLEST_BYTES = MIB


def draw(results: list[CaseResult], facts: dict[str, Any], path: Path) -> None:
    """Horizontal bars of multiples of the roof, on a log scale: 1 is as fast as memory allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r.case.shape.bytes >= SMALLEST_BYTES] or results
    multiples = [r.times_roof(m) for r in shown for m in r.measurements if m.timing]
    low = min(0.8, *multiples) * 0.85
    high = max(2.0, *multiples) * 8
    lines = sum(1.5 + sum(m.timing is not None for m in r.measurements) for r in shown)
    figure, axes = pyplot.subplots(figsize=(11, 1.7 + 0.27 * lines), layout="constrained")
    axes.set_xscale("log")
    axes.set_xlim(low, high)

    place, ticks = 0.0, []
    for result in shown:
        axes.text(low, place, f" {result.title}", va="center", fontweight="bold", fontsize=10)
        for measurement in result.measurements:
            if measurement.timing:
                place += 1
                ticks.append((place, measurement.name))
                _bar(axes, place, result, measurement)
        bars = sum(m.timing is not None for m in result.measurements)
        axes.vlines(1, place - bars + 0.4, place + 0.55, color="black", linewidth=1.4, zorder=3)
        place += 1.5
    axes.set_ylim(place - 0.5, -0.8)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=9)
    marks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= x <= high / 3]
    axes.set_xticks(marks, [f"{x:g}x" for x in marks])
    axes.minorticks_off()
    axes.set_xlabel("time as a multiple of the roof, log scale (black line: the roof, 1x)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['instruction_set']}"
    threads = "" if "gpu" in facts else f", {facts['threads']} threads"
    figure.suptitle(
        "Distillation loss steps against moving the same bytes once\n"
        f"{machine}{threads}, torch {facts['torch']}",
        fontsize=11.5,
    )
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _bar(axes: "Axes", place: float, result: CaseResult, measurement: Measurement) -> None:
    times, ours = result.times_roof(measurement), measurement.name == OURS
    axes.barh(
        place,
        times,
        height=0.82,
        color=COLOURS.get(measurement.name, OTHER_COLOUR),
        hatch="///" if measurement.wrong else None,
        edgecolor="white",
    )
    parts = [f"{times:.3g}x", _time(measurement.seconds)]
    if measurement.memory is not None:
        parts.append(f"{measurement.memory.peak / MIB:,.0f} MiB")
    if measurement.wrong:
        parts.append(f"WRONG: {measurement.wrong}")
    weight = "bold" if ours else "normal"
    axes.text(times, place, "  " + ", ".join(parts), va="center", fontsize=8.5, fontweight=weight)


def _time(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3)))
    return f"{seconds * 1e3:.{min(digits, 4)}f} ms"
