"""Hardware counters of four kernels, read by ncu: memory, instructions, what warps wait for."""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.build import search_path
from benchmarks.gpu.stage import Missing, Record, options_of, require_kernels, run

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats")
SECTIONS += ("InstructionStats", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Chart")
SECTIONS += ("MemoryWorkloadAnalysis_Tables",)
#: What the table shows of a kernel, where ncu has it.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_sector_hit_rate.pct": "l2_hits_percent",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__block_size": "threads",
    "launch__grid_size": "blocks",
    "launch__cluster_size": "cluster",
}
#: Cycles that a warp waits for each reason, for each instruction issued.
STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
LARGEST_STALLS = 3
#: What ncu says where a machine does not let it read counters.
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "not supported", "Failed to initialize")


def command(log: Path, rows: int) -> list[str]:
    """Of ncu; the clocks are left alone."""
    options = ["--csv", "--page", "raw", "--log-file", str(log), "--force-overwrite"]
    options += ["--target-processes", "all", "--profile-from-start", "off"]
    options += ["--clock-control", "none", "--kernel-name-base", "demangled"]
    options += ["--kernel-name", "regex:fastkd"]
    for section in SECTIONS:
        options += ["--section", section]
    program = [sys.executable, "-m", "benchmarks.gpu.profiled", "--rows", str(rows)]
    return ["ncu", *options, *program]


def number(text: str) -> float | str:
    """As ncu prints it, with commas."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def parse(text: str) -> list[dict[str, Any]]:
    """Return a dictionary a kernel of a raw page: names, a line of units, a line a kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if not table or "Kernel Name" not in table[0]:
        return []
    names, *rest = table
    units = dict(zip(names, rest[0], strict=False)) if rest else {}
    kernels = []
    for line in rest:
        values = dict(zip(names, line, strict=False))
        if not values.get("ID"):  # the units
            continue
        row: dict[str, Any] = {"kernel": values["Kernel Name"].split("(")[0][:120]}
        for metric, name in METRICS.items():
            if values.get(metric):
                row[name] = number(values[metric])
                if unit := units.get(metric):
                    row[f"{name}_unit"] = unit
        stalls = {
            name.removeprefix(STALL[0]).removesuffix(STALL[1]): number(value)
            for name, value in values.items()
            if name.startswith(STALL[0]) and name.endswith(STALL[1])
        }
        waits = {k: v for k, v in stalls.items() if isinstance(v, float)}
        largest = sorted(waits, key=waits.__getitem__, reverse=True)[:LARGEST_STALLS]
        row["stalls"] = {k: waits[k] for k in largest}
        kernels.append(row)
    return kernels


def counters(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Run ncu, and keep what it says of each kernel."""
    require_kernels()
    path = search_path()
    if not shutil.which("ncu", path=path):
        raise Missing("ncu (Nsight Compute)")
    log = options.output / "counters.csv"
    done = subprocess.run(
        command(log, options.rows),
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    text = log.read_text(errors="replace") if log.exists() else ""
    for row in parse(text):
        record.add(row)
    if record.rows:
        return done.returncode == 0, f"{len(record.rows)} kernels"
    errors = [x for x in (text + done.stdout).splitlines() if "ERROR" in x or "Error" in x]
    said = errors[0].strip() if errors else f"ncu ended with {done.returncode}"
    if any(word in text + done.stdout for word in REFUSED):
        raise Missing(f"hardware counters ({said})")
    return False, f"no kernel was profiled: {said}"


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    return run("counters", counters, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
