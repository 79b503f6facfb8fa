"""The ops' own tests on the GPU's kernels, without those that compile or are many small launches.

The files are those of `make test-gpu` (tests/op_tests.txt).
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter

from benchmarks.gpu.stage import ROOT, Missing, Record, options_of, require_kernels, run

LEFT_OUT = "not compile and not opcheck and not gradcheck"
PROCESSES = 8
#: A line of `pytest -v`, with and without pytest-xdist.
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
LINE = re.compile(
    rf"(?:\[gw\d+\] \[ *\d+%\] (?P<a>{OUTCOMES}) (?P<b>\S*::.*?)|(?P<c>\S*::.*?) (?P<d>{OUTCOMES}))"
    r"(?: \(.*\))?(?:\s+\[ *\d+%\])?\s*"
)
#: A line of the summary at the end, which gives a failure's reason.
REASON = re.compile(r"(?:FAILED|ERROR) (?P<test>\S*(?:\.py|::.*?))(?: - (?P<reason>.*))?")


def outcome_of(line: str) -> tuple[str, str] | None:
    """Return a test and its outcome, where the line has them."""
    match = LINE.fullmatch(line.rstrip("\n"))
    if match is None:
        return None
    return match["b"] or match["c"], match["a"] or match["d"]


def files() -> list[str]:
    """The op tests."""
    patterns = (ROOT / "tests" / "op_tests.txt").read_text().split()
    return [str(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def command(backends: str, chosen: list[str], processes: int) -> list[str]:
    """Of pytest."""
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--color=no", "--maxfail=100"]
    options += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-k", LEFT_OUT]
    if importlib.util.find_spec("xdist") and processes > 1:
        options += ["-n", str(processes), "--dist", "load"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    return [sys.executable, "-m", "pytest", *options, "--backends", backends, *chosen]


def op_tests(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Run pytest and count; what has failed is known also if time runs out."""
    if options.backends == "cuda":
        require_kernels()
    for module in ("pytest", "hypothesis"):
        if not importlib.util.find_spec(module):
            raise Missing(module)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    site = (options.output / "site").absolute()
    if (site / "fastkd").exists():
        environment["FASTKD_TESTED_FOLDER"] = str(site)
    process = subprocess.Popen(
        command(options.backends, options.files or files(), options.processes),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    counts: Counter[str] = Counter()
    bad: dict[str, str] = {}
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if outcome := outcome_of(line):
                counts[outcome[1].lower()] += 1
                if outcome[1] in ("FAILED", "ERROR"):
                    bad.setdefault(outcome[0], "")
            elif match := REASON.fullmatch(line.rstrip("\n")):
                bad[match["test"]] = match["reason"] or ""
        returncode = process.wait()
    finally:
        record.facts |= {"counts": dict(counts)}
        record.rows = [{"test": test, "reason": reason} for test, reason in bad.items()]
    said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no test ran"
    return returncode == 0 and counts["passed"] > 0, said


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    parser.add_argument("--backends", default="cuda", help="of the tests (tests/conftest.py)")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("files", nargs="*", help="default: those of tests/op_tests.txt")
    return run("op_tests", op_tests, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
