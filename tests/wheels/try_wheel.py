"""Install a wheel into new environments, without compilers on the PATH, and run smoke.py there.

    python tests/wheels/try_wheel.py dist/fastkd-*.whl --torch torch==2.10.0 --torch torch==2.14.1
    python tests/wheels/try_wheel.py dist/fastkd-*.whl --python /path/of/an/environment/bin/python

--python uses an environment in which torch is installed already, and leaves fastkd in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py").resolve()


def without_compilers(folder):
    """Return an environment whose PATH has one folder, without compilers."""
    Path(folder).mkdir(exist_ok=True)
    kept = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX", "CUDA_HOME")
    }
    return {**kept, "PATH": str(folder)}


def try_wheel(wheel, python, folder):
    """Install the wheel and run the smoke test."""
    run = dict(check=True, cwd=folder, env=without_compilers(Path(folder) / "empty"))
    pip = [python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps"]
    subprocess.run([*pip, wheel], **run)
    subprocess.run([python, "-m", "fastkd"], **run)
    subprocess.run([python, SMOKE], **run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=lambda x: Path(x).resolve())
    parser.add_argument("--torch", action="append", default=[], help="requirement; may be repeated")
    parser.add_argument("--python", action="append", default=[], help="an environment's python")
    given = parser.parse_args()
    if not given.torch and not given.python:
        parser.error("one of --torch and --python is needed")
    for requirement in given.torch:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin/python"
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", requirement, "numpy"], check=True
            )
            try_wheel(given.wheel, python, folder)
    for python in given.python:
        with tempfile.TemporaryDirectory() as folder:
            try_wheel(given.wheel, Path(python).absolute(), folder)
    print("every environment works", file=sys.stderr)


if __name__ == "__main__":
    main()
