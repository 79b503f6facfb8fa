"""The Triton kernel that benchmarks compare with, run by Triton's interpreter on the CPU.

    python tests/test_triton_kl.py

is the process that runs it: TRITON_INTERPRET is read when Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

MISSING = "triton is not installed: the Triton kernel of the benchmarks is NOT tested"
ROWS, VOCAB = 3, 2500  # the last block of 1,024 columns is cut
INCOMING = (1.0, -2.5)


def _main() -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from benchmarks.triton_kl import INTERPRETED, forward_kl
    from fastkd import reference

    assert INTERPRETED
    torch.manual_seed(0)
    for case in ("plain", "masked columns", "equal", "no gradient"):
        student, teacher = (4 * torch.randn(ROWS, VOCAB) for _ in "st")
        if case == "masked columns":
            student[:, 7:1100] = teacher[:, 7:1100] = -torch.inf
            teacher[:, 2400] = -torch.inf
        if case == "equal":
            teacher = student.clone()
        for incoming in INCOMING:
            mine = student.clone().requires_grad_(case != "no gradient")
            exact = student.double().requires_grad_(case != "no gradient")
            value = forward_kl(mine, teacher)
            right = reference.softmax_divergence(exact, teacher.double(), reduction="batchmean")
            torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=2e-6)
            if case != "no gradient":
                value.backward(torch.tensor(incoming))
                right.backward(torch.tensor(incoming, dtype=torch.float64))
                error = (mine.grad.double() - exact.grad).norm()
                assert error <= 2e-6 * exact.grad.norm() + 1e-7, (case, incoming, error)
        print(f"checked: {case}")


def test_value_and_gradient_are_the_definition_s():
    if importlib.util.find_spec("triton") is None:
        warnings.warn(MISSING)
        pytest.skip(f"{MISSING} (pip install --no-deps triton)")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked: ") == 4


if __name__ == "__main__":
    _main()
