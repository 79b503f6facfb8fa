"""What is shown and kept of the results: a table, a figure, JSON with the facts of the machine."""

import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.figure import draw
from benchmarks.harness import OURS, CaseResult, Measurement
from benchmarks.measure import MIB, memory_of

if TYPE_CHECKING:
    from rich.table import Table


def require_extra() -> None:
    """Refuse to start where the table or the figure could not be made at the end."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"benchmarks need {error.name}: pip install fastkd[bench]") from None


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to tell whether two results can be compared."""
    import fastkd

    probe = 64 * MIB
    seen = memory_of(lambda: torch.ones(probe, dtype=torch.uint8, device=device), device)
    facts = {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": getattr(fastkd, "cpu_capability", lambda: None)(),
        "device": str(device),
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "peak_memory_of_64_mib_reads_mib": None if seen is None else seen.peak / MIB,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    return facts


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def results_table(results: list[CaseResult]) -> "Table":
    """One row a contestant, grouped by case, the roof first."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Loss steps beside the roof (the same bytes moved by a plain kernel)")
    table.add_column("case", max_width=34)
    table.add_column("contestant")
    for name in ("median ms", "spread", "x roof", "fastkd is faster", "peak MiB", "kept MiB"):
        table.add_column(name, justify="right")
    for result in results:
        speed = result.case.shape.traffic_bytes(result.case.traffic) / result.roof.median
        table.add_row(
            result.title,
            f"[dim]roof: {result.roof_name}, {speed / 1e9:.1f} GB/s",
            milliseconds(result.roof.median),
            f"{result.roof.spread:.0%}",
            "1.00",
        )
        for measurement in result.measurements:
            style = "bold" if measurement.name == OURS else None
            table.add_row("", *(escape(x) for x in _cells(result, measurement)), style=style)
            if measurement.wrong:
                table.add_row("", f"[bold red]WRONG: {escape(measurement.wrong)}")
            if measurement.failed:
                table.add_row("", f"[yellow]not run: {escape(measurement.failed)}")
        table.add_section()
    return table


def busy_warning(results: list[CaseResult]) -> str | None:
    """Say that the machine was shared, where that spoils the numbers."""
    shared = sum(r.shared for r in results)
    if not shared:
        return None
    return (
        f"!!! Other processes kept cores busy during {shared} of {len(results)} cases (marked). "
        "Their ratios and verdicts do not count: run again on an idle machine."
    )


def _cells(result: CaseResult, measurement: Measurement) -> list[str]:
    timing, memory = measurement.timing, measurement.memory
    if timing is None:
        return [measurement.name, *"------"]
    faster = result.speedup_over(measurement)
    return [
        measurement.name,
        milliseconds(timing.median),
        f"{timing.spread:.0%}",
        f"{result.times_roof(measurement):.2f}",
        "" if measurement.name == OURS or math.isnan(faster) else f"{faster:.1f} x",
        "?" if memory is None else f"{memory.peak / MIB:.1f}",
        "?" if memory is None else f"{memory.kept / MIB:.1f}",
    ]


def milliseconds(seconds: float) -> str:
    """Print a time with as many digits as mean something."""
    return f"{seconds * 1e3:.4f}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}"


def as_json(result: CaseResult) -> dict[str, Any]:
    """Everything measured about one case."""
    case = result.case
    return {
        "case": case.name,
        "rows": case.shape.rows,
        "vocab": case.shape.vocab,
        "dtype": str(case.shape.dtype).removeprefix("torch."),
        "gradient": case.gradient,
        "bytes": case.shape.traffic_bytes(case.traffic),
        "other_cores_busy": result.other_cores,
        "roof": {"kernel": result.roof_name, "median_ms": result.roof.median * 1e3},
        "contestants": [_as_json(result, m) for m in result.measurements],
    }


def _as_json(result: CaseResult, measurement: Measurement) -> dict[str, Any]:
    timing = measurement.timing
    numbers: dict[str, float | None] = {
        "median_ms": measurement.seconds * 1e3,
        "spread": timing.spread if timing else None,
        "rounds": len(timing.samples) if timing else None,
        "times_roof": result.times_roof(measurement),
        "fastkd_speedup": result.speedup_over(measurement),
        "peak_bytes": measurement.memory.peak if measurement.memory else None,
        "kept_bytes": measurement.memory.kept if measurement.memory else None,
        "loss_error": measurement.loss_error,
        "gradient_error": measurement.gradient_error,
    }
    known = {k: None if v is not None and not math.isfinite(v) else v for k, v in numbers.items()}
    return {
        "name": measurement.name,
        **known,
        "wrong": measurement.wrong,
        "failed": measurement.failed,
    }


def save(
    folder: Path,
    stem: str,
    results: list[CaseResult],
    facts: dict[str, Any],
    goals: list[dict[str, Any]] | None = None,
) -> list[Path]:
    """Write `stem`.json and `stem`.png."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
    content = {"machine": facts, "cases": [as_json(r) for r in results], "goals": goals}
    data.write_text(json.dumps(content, indent=2) + "\n")
    draw(results, facts, picture)
    return [data, picture]


def finish_table(
    table: "Table", cases: list[dict[str, Any]], busy: list[str], output: Path
) -> None:
    """Print a CPU benchmark's own table and the machine, and write both; `busy` cases are void."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(table)
    facts = machine_facts(torch.device("cpu"))
    console.print("  ".join(f"{k}: {v}" for k, v in facts.items()), style="dim", highlight=False)
    if busy:
        console.print(
            f"!!! Other processes kept cores busy during: {', '.join(busy)}. These do not count: "
            "run again on an idle machine.",
            style="bold red",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": facts, "cases": cases}, indent=2) + "\n")
    console.print(f"written: {output}", highlight=False, soft_wrap=True)
