"""No op reads or writes outside its tensors: they touch pages without access."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("guard_pages.py")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.only("cpu", "simt")
def test_no_op_leaves_its_tensors(backend, request):
    done = run(request.node.callspec.params["backend"])
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, f"{done.returncode} in {last}\n{done.stderr[-2000:]}"
    assert last == "done"


@pytest.mark.parametrize("edge", ["start", "end"])
def test_the_pages_are_guarded(edge):
    """A read of one element outside ends the process."""
    assert run("crash", edge).returncode in (-signal.SIGSEGV, -signal.SIGBUS)
