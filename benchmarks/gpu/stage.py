"""What every stage of the report has: a record in JSON, kept up to date, and how it ends."""

import argparse
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]

#: A stage's record is written so often, in seconds: what a stage that is killed has done is known.
PERIOD = 1.0
RUNNING, DONE, FAILED, MISSING, STOPPED = "running", "done", "failed", "missing", "stopped"


class Missing(Exception):
    """What this machine lacks for a stage."""


class Record:
    """A stage's results."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.status, self.summary = RUNNING, ""
        #: What holds for the whole stage, and a dictionary for each result.
        self.facts: Row = {}
        self.rows: list[Row] = []
        self._written = 0.0
        self.write()

    def add(self, row: Row) -> None:
        """Keep a result; print it to the log."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if time.monotonic() - self._written > PERIOD:
            self.write()

    def finish(self, status: str, summary: str) -> None:
        """Write how it ended."""
        self.status, self.summary = status, summary
        self.write()

    def write(self) -> None:
        """Write the file as a whole, so that it can be read at any time."""
        self._written = time.monotonic()
        content = {
            "stage": self.stage,
            "status": self.status,
            "summary": self.summary,
            "facts": self.facts,
            "rows": self.rows,
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)


#: Fills a record; returns whether all is well, and a line that says what was found.
Body = Callable[[Record, argparse.Namespace], tuple[bool, str]]


def options_of(description: str) -> argparse.ArgumentParser:
    """The options that every stage has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    limit = "seconds from the process's start after which it should end by itself"
    parser.add_argument("--limit", type=float, default=math.inf, help=limit)
    return parser


def age() -> float:
    """Seconds since this process began, 0 where the system does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, AttributeError):
        return 0.0


def run(stage: str, body: Body, options: argparse.Namespace) -> int:
    """Run a stage's body; return the process's exit status: 1 where something is wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    options.output.mkdir(parents=True, exist_ok=True)
    record = Record(options.output / f"{stage}.json", stage)
    try:
        well, summary = body(record, options)
        status = DONE if well else FAILED
    except Missing as missing:
        status, summary = MISSING, str(missing)
    except KeyboardInterrupt:
        status, summary = STOPPED, f"stopped after {len(record.rows)} results"
    except BaseException as error:
        traceback.print_exc()
        status = FAILED
        summary = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    record.finish(status, summary)
    print(f"{stage}: {status}: {summary}", flush=True)
    return int(status in (FAILED, STOPPED))


def of_tests(name: str) -> ModuleType:
    """Return a module of the tests, as the tests import it: other packages may be named `tests`."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def require_gpu() -> Any:
    """Return torch, or raise Missing: torch with a GPU."""
    try:
        import torch
    except ImportError as error:
        raise Missing(f"torch ({error})") from None
    if not torch.cuda.is_available():
        raise Missing(f"a GPU (torch {torch.__version__}: torch.cuda.is_available() is False)")
    return torch


def require_kernels() -> Any:
    """Return torch, or raise Missing: a GPU, and fastkd with CUDA kernels."""
    torch = require_gpu()
    try:
        from fastkd._ops.library import _PATH, CUDA_ARCHITECTURES
    except ImportError as error:
        raise Missing(f"fastkd, which the build makes ({str(error).splitlines()[0]})") from None
    if not CUDA_ARCHITECTURES:
        raise Missing(f"CUDA kernels, which the build makes ({_PATH} has none)")
    print(f"fastkd: {_PATH}, CUDA kernels for {CUDA_ARCHITECTURES}", file=sys.stderr)
    return torch
