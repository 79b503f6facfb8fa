"""What the example shows at its end: two tables, a figure, and the numbers as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
from _loss_step import Contestant
from _training import History, Score
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ACCENT, NEUTRAL, DARK = "#d1495b", "#9aa5b1", "#26323f"
MIB = 1 << 20


def print_tables(
    console: Console,
    *,
    before: Score,
    after: Score,
    teacher: Score,
    contestants: list[Contestant],
    batch: str,
) -> None:
    """Print held-out quality and the cost of the loss step."""
    quality = Table(
        title="Held-out text: the student before and after",
        title_justify="left",
        title_style="bold",
    )
    for heading in ("", "before", "after", "teacher"):
        quality.add_column(heading, justify="right" if heading else "left")
    for label, field in (
        ("KL to the teacher, nats a token", "kl"),
        ("cross-entropy, nats a token", "cross_entropy"),
        ("bits per byte", "bits_per_byte"),
    ):
        quality.add_row(label, *(f"{getattr(s, field):.3f}" for s in (before, after, teacher)))
    console.print(quality)

    cost = _table(f"Loss step, forward and backward: {batch}")
    for heading in ("", "time", "peak extra memory", "training with it"):
        cost.add_column(heading, justify="right" if heading else "left")
    ours = contestants[0]
    for one in contestants:
        if one.problem is not None:
            cost.add_row(one.name, f"unavailable: {one.problem}", "", "")
            continue
        cost.add_row(
            one.name,
            f"{one.milliseconds:,.0f} ms{_times(one.milliseconds, ours.milliseconds)}",
            "unknown"
            if one.extra_bytes is None
            else f"{one.extra_bytes / MIB:,.0f} MiB{_times(one.extra_bytes, ours.extra_bytes)}",
            f"{one.training_tokens_per_second:,.0f} tokens/s",
            style="bold" if one is ours else None,
        )
    console.print(cost)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold")


def _times(value: float | None, ours: float | None) -> str:
    return f" ({value / ours:.1f}×)" if value and ours and value != ours else ""


def style() -> None:
    """Set what all figures have in common."""
    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": DARK,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 12,
            "axes.titlepad": 10,
            "text.color": DARK,
            "axes.labelcolor": DARK,
            "xtick.color": DARK,
            "ytick.color": DARK,
        }
    )


def show(
    console: Console, title: str, headings: list[str], rows: list[list[str]], *, left: int = 1
) -> None:
    """Print a table; the first `left` columns are words."""
    table = _table(title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save(figure: Figure, path: Path, console: Console, title: str) -> None:
    """Write a figure with its title and say where it is."""
    figure.suptitle(title, x=0.008, ha="left", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    console.print(f"Figure: {path}", soft_wrap=True)


def save_figure(
    path: Path, history: History, contestants: list[Contestant], *, title: str, batch: str
) -> None:
    """Draw the loss curves, and bars of the loss step's time and memory."""
    style()
    figure, (curves, time, memory) = plt.subplots(
        1, 3, figsize=(14, 5), width_ratios=(1.9, 1, 1), layout="constrained"
    )
    figure.suptitle(title, x=0.008, ha="left", fontsize=14)
    _draw_curves(curves, history)
    _draw_bars(time, contestants, "milliseconds", 1.0, "Time of the loss step", "ms")
    _draw_bars(memory, contestants, "extra_bytes", MIB, "Peak extra memory", "MiB")
    figure.supxlabel(
        f"Loss step: forward + backward of KL and label cross-entropy, {batch}",
        fontsize=10,
        x=0.992,
        ha="right",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_curves(axes: Axes, history: History) -> None:
    axes.plot(
        range(1, len(history.losses) + 1),
        history.losses,
        color=NEUTRAL,
        linewidth=1.2,
        label="training loss: KL + 0.5 × cross-entropy",
    )
    axes.plot(
        history.steps, history.train_kl, color=DARK, marker="o", markersize=3.5, label="training KL"
    )
    axes.plot(
        history.steps, history.held_kl, color=ACCENT, marker="o", markersize=4, label="held-out KL"
    )
    axes.annotate(
        f"{history.held_kl[-1]:.2f}",
        (history.steps[-1], history.held_kl[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=ACCENT,
        weight="bold",
    )
    axes.set(
        title="Distillation", xlabel="step", ylabel="nats a token", xlim=(0, None), ylim=(0, None)
    )
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="upper right")


def _draw_bars(
    axes: Axes, contestants: list[Contestant], field: str, unit: float, title: str, label: str
) -> None:
    values = [getattr(one, field) for one in contestants]
    heights = [0.0 if value is None else value / unit for value in values]
    colors = [ACCENT] + [NEUTRAL] * (len(contestants) - 1)
    bars = axes.bar([one.name for one in contestants], heights, color=colors, width=0.62)
    axes.bar_label(
        bars,
        [
            "n/a" if value is None else f"{height:,.0f}{_ratio(height, heights[0])}"
            for value, height in zip(values, heights, strict=True)
        ],
        padding=3,
    )
    axes.set(title=f"{title}, {label}", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08, y=0.15)


def _ratio(height: float, ours: float) -> str:
    return f"\n{height / ours:.1f}×" if ours and height != ours else ""


def save_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Write the run's numbers; dataclasses become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1, default=dataclasses.asdict) + "\n")
