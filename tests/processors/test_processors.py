"""Row kernels compiled for other processors, and by another compiler, against float64.

The kernels are built into an executable without torch (rows.cpp). One for aarch64 runs under
qemu-user. What a machine does not have is left out, with the package that has it.
"""

import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALL_DIVERGENCES, LOSS_ERROR, NEED_LABELS, allowed_error, logits

from fastkd import reference

ROOT = Path(__file__).parents[2]
#: In the order of Dtype in csrc/arguments/row.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: (compiler, its Debian package, options of CMake, emulator, its Debian package)
BUILDS = {
    "aarch64": (
        *("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"),
        ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"],
        *("qemu-aarch64", "qemu-user"),
    ),
    # x86-64-v3: other sets are only linked.
    "clang": ("clang++", "clang", ["-DFASTKD_TESTED_SET=x86_64_v3"], None, None),
}


@pytest.fixture(scope="module", params=BUILDS)
def rows(request):
    """Run the executable: bytes in, bytes out."""
    compiler, package, options, emulator, emulator_package = BUILDS[request.param]
    for program, its_package in ((compiler, package), (emulator, emulator_package)):
        if program is not None and shutil.which(program) is None:
            pytest.skip(f"{program} is not on the PATH (Debian: {its_package})")
    if request.param == "clang" and platform.machine() != "x86_64":
        pytest.skip("x86-64-v3 is an instruction set of x86-64")
    folder = ROOT / "build" / request.param
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DFASTKD_ROWS=on"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*configure, *options], ["cmake", "--build", folder, "--target", "rows"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

    def run(data):
        command = [*([emulator] if emulator else []), folder / "rows"]
        done = subprocess.run(command, input=data, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def header(divergence, vocab, dtype, label, numbers):
    """Return a problem's Header (rows.cpp)."""
    places = ALL_DIVERGENCES.index(divergence), vocab, DTYPES.index(dtype), label
    return struct.pack("<5q5d", *places, divergence in NEED_LABELS, *numbers)


def raw(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def problems():
    """Every divergence and dtype; short, odd and long rows; masked logits, equal sides."""
    for divergence in ALL_DIVERGENCES:
        for dtype in DTYPES:
            for vocab in (1, 33, 1031, 20_011):
                if vocab == 1 and divergence in NEED_LABELS:
                    continue  # there is no token but the label
                student, teacher = logits((vocab,)).to(dtype), logits((vocab,)).to(dtype)
                if vocab == 1031:
                    teacher[5:9] = -torch.inf
                if vocab == 33:
                    teacher = student + 1e-3
                yield divergence, dtype, student, teacher.to(dtype), vocab // 2


def test_kernels_are_right(rows):
    numbers = (1.5, 0.8, 0.3, 0.7, 0.4)  # both temperatures, beta, alpha, label_weight
    given = list(problems())
    sent = b"".join(
        header(divergence, student.numel(), dtype, label, numbers) + raw(student) + raw(teacher)
        for divergence, dtype, student, teacher, label in given
    )
    got = memoryview(rows(sent))
    temperature, teacher_temperature, beta, alpha, label_weight = numbers
    options = dict(temperature=temperature, teacher_temperature=teacher_temperature, beta=beta)
    for divergence, dtype, student, teacher, label in given:
        exact = [x.double().requires_grad_() for x in (student, teacher)]
        more = {"alpha": alpha} if divergence in ("alpha_beta", "decoupled_kl") else {}
        right = reference.softmax_divergence(
            *exact, divergence=divergence, labels=torch.tensor(label), label_weight=label_weight,
            square_temperature=False, **options, **more,
        )  # fmt: skip
        if not right.requires_grad or not right.isfinite():
            right = right.detach().requires_grad_()
        loss = struct.unpack_from("<d", got)[0]
        got = got[8:]
        name = f"{divergence}, {dtype}, {student.numel()}"
        error = LOSS_ERROR[dtype] * max(1.0, abs(right.item()))
        assert loss == pytest.approx(right.item(), abs=error, nan_ok=True), name
        gradients = torch.autograd.grad(right, exact, allow_unused=True)
        for gradient, x in zip(gradients, (student, teacher), strict=True):
            size = x.numel() * x.element_size()
            found = torch.frombuffer(bytearray(got[:size]), dtype=dtype).double()
            got = got[size:]
            if gradient is None or not gradient.isfinite().all():
                continue
            limit = allowed_error(gradient, dtype, divergence)
            assert (found - gradient).norm() <= limit, name
    assert not got
