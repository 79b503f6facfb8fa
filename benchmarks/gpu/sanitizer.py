"""compute-sanitizer over small sizes of the smoke test: memcheck, racecheck, synccheck.

The three run side by side. Only fastkd's kernels are instrumented.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.build import search_path
from benchmarks.gpu.stage import Missing, Record, age, options_of, require_kernels, run

TOOLS = ("memcheck", "racecheck", "synccheck")
#: On sm_90 one warp a row, one block, clusters of 2 and 4; 8 with 128,256.
SMOKE = ("--rows", "2", "--modes", "eager", "--dtypes", "bfloat16", "float32")
SMOKE += ("--vocab", "33000", "1000", "5001", "128256")
#: Seconds for what a tool does after the smoke test, and of the smoke test if there is no limit.
MARGIN, DEFAULT_LIMIT = 5.0, 60.0
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
REFUSED = ("Device not supported", "not supported on", "Failed to initialize", "Unable to")


def command(tool: str, folder: Path, seconds: float) -> list[str]:
    """Of compute-sanitizer."""
    options = ["--tool", tool, "--print-limit", "20", "--kernel-regex", "kns=fastkd"]
    smoke = [sys.executable, "-m", "benchmarks.gpu.smoke", "--output", str(folder), *SMOKE]
    return ["compute-sanitizer", *options, *smoke, "--limit", f"{seconds:g}"]


def verdict(tool: str, text: str, smoke: dict[str, Any]) -> dict[str, Any]:
    """What a tool has found: reports, and what the smoke test says of results."""
    found = SUMMARY.findall(text)
    lines = [x for x in text.splitlines() if x.startswith("=========")]
    row: dict[str, Any] = {
        "tool": tool,
        "reports": int(found[-1]) if found else None,
        "smoke": smoke.get("summary", "did not end"),
        "first": [x.removeprefix("=========").strip() for x in lines[1:4]],
    }
    if not found:
        refused = [x for x in lines if any(word in x for word in REFUSED)]
        row["missing" if refused else "failed"] = (refused or lines or ["no output"])[-1]
    elif row["reports"] or smoke.get("status") != "done":
        row["failed"] = f"{row['reports']} reports; smoke test: {row['smoke']}"
    return row


def sanitizer(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Run the tools."""
    require_kernels()
    path = search_path()
    if not shutil.which("compute-sanitizer", path=path):
        raise Missing("compute-sanitizer")
    seconds = max(5.0, min(options.limit, DEFAULT_LIMIT) - age() - MARGIN)
    running = {}
    for tool in options.tools:
        folder = options.output / f"sanitizer_{tool}"
        folder.mkdir(exist_ok=True)
        # Each tensor is an allocation of its own, so that memcheck knows where it ends.
        environment = {**os.environ, "PATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = (folder / "log").open("w")
        running[tool] = (
            folder,
            subprocess.Popen(
                command(tool, folder, seconds),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            ),
        )
    for tool, (folder, process) in running.items():
        process.wait()
        result = folder / "smoke.json"
        smoke = json.loads(result.read_text()) if result.exists() else {}
        record.add(verdict(tool, (folder / "log").read_text(errors="replace"), smoke))
    if all("missing" in row for row in record.rows):
        raise Missing(f"a device that compute-sanitizer supports ({record.rows[0]['missing']})")
    said = [f"{row['tool']} {row['reports']}" for row in record.rows]
    return not any("failed" in row for row in record.rows), f"reports: {', '.join(said)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    return run("sanitizer", sanitizer, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
