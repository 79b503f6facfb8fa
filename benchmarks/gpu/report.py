"""The report on a GPU: runs the stages, each under its own time limit, and makes one table.

    benchmarks/gpu_report.sh [FOLDER]    # or make gpu-report

FOLDER (build/gpu_report) gets of each stage NAME.log and NAME.json, then report.json and report.md.
A stage that hangs costs its own time; what it had found by then is in the report. A stage that
lacks something says what. Nothing is downloaded, and the GPU's settings are left alone.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import FAILED, MISSING, ROOT, RUNNING, STOPPED, Row
from benchmarks.gpu.tables import markdown

OUTPUT = ROOT / "build" / "gpu_report"
#: From an interrupt, at which a stage writes what it has, to its end by force.
GRACE = 5.0
#: So much earlier a stage that can should end by itself.
MARGIN = 3.0


@dataclass(frozen=True)
class Stage:
    """A module of this package."""

    name: str
    #: Seconds, the grace included.
    limit: float
    package: str = "benchmarks.gpu"


STAGES = (
    Stage("build", 150),
    Stage("smoke", 40),
    Stage("op_tests", 75),
    Stage("times", 75),
    Stage("counters", 35),
    Stage("sanitizer", 45),
    Stage("peers", 60),
)


def environment(output: Path) -> dict[str, str]:
    """Python's path: what the build stage made comes before the sources."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(output / "site"), str(ROOT), *(x for x in others if x)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def end(process: subprocess.Popen[Any], grace: float) -> None:
    """Interrupt a stage and its children, then end them by force; never wait for long."""
    for number, seconds in ((signal.SIGINT, grace), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, PermissionError):
            break
        except subprocess.TimeoutExpired:
            continue  # a process in the driver's hands may outlive even that


def run_stage(stage: Stage, output: Path, arguments: list[str], grace: float = GRACE) -> Row:
    """Run a stage and return its record, with how long it took."""
    record, log = output / f"{stage.name}.json", output / f"{stage.name}.log"
    record.unlink(missing_ok=True)
    work = max(1.0, stage.limit - grace)
    command = [sys.executable, "-m", f"{stage.package}.{stage.name}", "--output", str(output)]
    command += ["--limit", f"{max(1.0, work - MARGIN):g}", *arguments]
    start = time.monotonic()
    timed_out = False
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=output,  # Python looks into its folder first: it must not have a fastkd
            env=environment(output),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(work)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end(process, grace)
    found = read(record)
    found |= {"seconds": time.monotonic() - start, "limit": stage.limit, "exit": process.poll()}
    if found["status"] == RUNNING:
        found["status"] = STOPPED if timed_out else FAILED
        done = f"after {len(found['rows'])} results"
        found["summary"] = f"stopped {done}" if timed_out else f"ended by {found['exit']} {done}"
        found["summary"] += f"; last: {last_line(log)}"
    return {"stage": stage.name} | found


def read(record: Path) -> Row:
    """A stage's record, or an empty one."""
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {"status": RUNNING, "summary": "", "facts": {}, "rows": []}


def last_line(log: Path) -> str:
    """What a stage was at."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "nothing")[:200]


def machine() -> Row:
    """What every number depends on."""
    facts = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    for name, command in {
        "commit": ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        "gpu": [
            *("nvidia-smi", "--format=csv,noheader"),
            "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu",
        ],
    }.items():
        if not shutil.which(command[0]):
            facts[name] = f"{command[0]} is missing"
            continue
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        text = (done.stdout or done.stderr).strip()
        facts[name] = text.splitlines()[0] if text else f"{command[0]} said nothing"
    return facts


def write(report: Row, output: Path) -> str:
    """Write report.json and report.md; return the latter."""
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (output / "report.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the exit status is 1 if one of them failed or was stopped."""
    parser = argparse.ArgumentParser(prog="gpu_report.sh", description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    add = parser.add_argument
    add("output", type=Path, nargs="?", default=OUTPUT, help="folder, default: build/gpu_report")
    add("--only", nargs="+", choices=names, default=names, help="these stages")
    add("--limit", nargs="+", default=[], metavar="STAGE=SECONDS", help="other time limits")
    add("--pass", nargs="+", default=[], metavar="STAGE=OPTIONS", help="a stage's own options")
    options = parser.parse_args(arguments)
    limits = {stage.name: stage.limit for stage in STAGES}
    passed = {name: "" for name in names}
    for given, into in ((options.limit, limits), (getattr(options, "pass"), passed)):
        for text in given:
            name, equals, value = text.partition("=")
            if name not in limits or not equals:
                parser.error(f"expected STAGE=..., with one of {', '.join(names)}, got {text}")
            try:
                into[name] = type(into[name])(value)
            except ValueError:
                parser.error(f"{name} must have a number of seconds, got {value}")

    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report: Row = {"machine": machine(), "stages": []}
    for name in options.only:
        print(f"{name}: at most {limits[name]:.0f} s ... ", end="", flush=True)
        found = run_stage(Stage(name, limits[name]), output, passed[name].split())
        print(f"{found['status']} in {found['seconds']:.0f} s: {found['summary']}", flush=True)
        report["stages"].append(found)
        report["seconds"] = time.monotonic() - start
        text = write(report, output)
    print(f"\n{text}\nwritten: {output / 'report.md'}, {output / 'report.json'}")
    ended = {stage["status"] for stage in report["stages"]}
    if ended == {MISSING}:
        print("nothing ran: each stage lacks something")
    return int(bool(ended & {FAILED, STOPPED}))


if __name__ == "__main__":
    sys.exit(main())
