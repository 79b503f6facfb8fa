"""Builds fastkd for this machine's GPU alone, against the torch that is installed.

Nothing is downloaded, and nothing but the report's folder is written to: the package goes to its
subfolder `site`, where the other stages find it.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks.gpu.stage import ROOT, Missing, Record, options_of, require_gpu, run

#: What builds, and the oldest version of setuptools that reads pyproject.toml.
DISTRIBUTIONS, OLDEST_SETUPTOOLS = ("pip", "setuptools", "pybind11"), 77
#: Where CUDA is, if not on the PATH.
CUDA_FOLDERS = ("/usr/local/cuda/bin",)


def search_path() -> str:
    """PATH with this Python's scripts first and CUDA's programs last."""
    scripts = str(Path(sys.executable).parent)
    return os.pathsep.join([scripts, os.environ.get("PATH", ""), *CUDA_FOLDERS])


def missing_tools(path: str) -> list[str]:
    """What the build needs and does not find."""
    programs = [name for name in ("nvcc", "cmake", "ninja") if not shutil.which(name, path=path)]
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler, path=path):
        programs.append(compiler)
    missing, versions = programs, {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    setuptools = versions.get("setuptools", f"{OLDEST_SETUPTOOLS}")
    if int(setuptools.partition(".")[0]) < OLDEST_SETUPTOOLS:
        missing.append(f"setuptools>={OLDEST_SETUPTOOLS} (found {setuptools})")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h (the development package of this Python)")
    return missing


def command(site: Path) -> list[str]:
    """Of pip: build in this environment, install to `site`."""
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--upgrade")
    options += ("--disable-pip-version-check", "--root-user-action=ignore", "--verbose")
    return [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(ROOT)]


def build(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Build, and say what with."""
    path = search_path()
    if options.arch is None:
        torch = require_gpu()
        major, minor = torch.cuda.get_device_capability()
        options.arch = f"{major}{minor}"
        record.facts |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if missing := missing_tools(path):
        raise Missing(", ".join(missing))
    nvcc = subprocess.run(
        ["nvcc", "--version"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    found = re.search(r"release ([\d.]+)", nvcc.stdout)
    record.facts |= {"nvcc": found[1] if found else "?", "architecture": options.arch}
    record.facts["cores"] = len(os.sched_getaffinity(0))

    site = options.output.absolute() / "site"
    flags = f"-DFASTKD_CUDA=on -DFASTKD_CUDA_ARCHS={options.arch} {options.cmake}".strip()
    start = time.perf_counter()
    done = subprocess.Popen(
        command(site),
        cwd=ROOT,
        env={**os.environ, "PATH": path, "CMAKE_ARGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    warnings = 0
    for line in done.stdout:
        print(line, end="", flush=True)
        warnings += "warning" in line.lower() and "ptxas" in line
    seconds = time.perf_counter() - start
    well = done.wait() == 0
    record.facts |= {"seconds": round(seconds, 1), "ptxas_warnings": warnings}
    if not well:
        return False, f"pip ended with {done.returncode}: see the log"
    said = f"sm_{options.arch}, nvcc {record.facts['nvcc']}, {seconds:.0f} s"
    return True, f"{said}, {warnings} warnings of ptxas (spills, local memory)"


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    parser.add_argument("--arch", help="architecture, for example 90; default: the GPU's")
    parser.add_argument("--cmake", default="", help="further options of CMake")
    return run("build", build, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
