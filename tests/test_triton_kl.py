"""The Triton kernel that benchmarks compare with: run by Triton's interpreter, compiled for a GPU.

    python tests/test_triton_kl.py interpret|compile

is the process that does it: TRITON_INTERPRET is read when Triton is imported.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

MISSING = "triton is not installed: the Triton kernel of the benchmarks is NOT tested"
ROWS, VOCAB = 3, 2500  # the last block of 1,024 columns is cut
INCOMING = (1.0, -2.5)


def _interpret() -> None:
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


def _compile() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from benchmarks.triton_kl import CONFIGS, _kl_kernel, _scale_kernel

    pointers = ("student_ptr", "teacher_ptr", "gradient_ptr")
    for dtype in ("fp32", "bf16"):
        for config in CONFIGS:
            signature = {name: f"*{dtype}" for name in pointers}
            signature = {"loss_ptr": "*fp32", "vocab": "i32", "scale": "fp32"} | signature
            constants = {"WITH_GRADIENT": True, "BLOCK": config.kwargs["BLOCK"]}
            names = _kl_kernel.arg_names
            source = ASTSource(
                _kl_kernel,
                {name: signature.get(name, "constexpr") for name in names},
                constants,
                {(names.index(x),): [["tt.divisibility", 16]] for x in (*pointers, "vocab")},
            )
            options = {"num_warps": config.num_warps}
            made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            ptx = made.asm["ptx"]
            for access in ("ld", "st"):  # of logits: the loss is one float a row
                every = re.findall(rf"{access}\.global\S*", ptx)
                wide = [x for x in every if ".v4" in x]
                assert len(wide) >= len(every) - 1, (dtype, config, every)
                assert wide
            assert "ex2.approx" in ptx
            assert ".local" not in ptx
    signature = {"gradient_ptr": "*bf16", "incoming_ptr": "*fp32", "count": "i64"}
    source = ASTSource(_scale_kernel, {**signature, "BLOCK": "constexpr"}, {"BLOCK": 4096})
    compile(source, target=GPUTarget("cuda", 90, 32))
    print("compiled")


def test_it_compiles_for_a_gpu_with_16_byte_accesses():
    assert run("compile", {"TRITON_DEFAULT_FP_FUSION": "1"}) == "compiled\n"


def test_value_and_gradient_are_the_definition_s():
    assert run("interpret", {"TRITON_INTERPRET": "1"}).count("checked: ") == 4


def run(what, environment):
    """Run this file with Triton, or skip so that it is seen."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(MISSING)
        pytest.skip(f"{MISSING} (pip install --no-deps triton)")
    done = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    {"interpret": _interpret, "compile": _compile}[sys.argv[1]]()
