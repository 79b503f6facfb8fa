"""The package as installed: the library's symbols, its command, its README, its house rules."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd

ROOT = Path(__file__).parent.parent
LIBRARY = Path(fastkd.__file__).with_name("_C.so")


def undefined_symbols():
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARY],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


def test_only_the_stable_abi_is_used():
    """One binary for every torch from 2.10 on: no C++ symbol of ATen, c10 or torch."""
    bad = [s for s in undefined_symbols() if re.search(r"\b(at|c10|torch|caffe2)::", s)]
    assert not bad
    assert any(s.startswith("aoti_torch_") for s in undefined_symbols())


def test_no_kernel_leaks_between_instruction_sets():
    """A weak function outside an instruction set's namespace may be the AVX-512 one for all."""
    listing = subprocess.run(
        ["nm", "--demangle", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    kernels = [line for line in listing.splitlines() if "softmax_divergence_row<" in line]
    if not kernels:
        pytest.skip("the library is stripped of its symbols")
    assert all(re.search(r"fastkd::(x86_64_v\d|baseline)::", line) for line in kernels)


def test_command():
    output = subprocess.run(
        [sys.executable, "-m", "fastkd"], check=True, capture_output=True, text=True
    ).stdout
    for word in (fastkd.__version__, torch.__version__, fastkd.cpu_capability(), "CUDA kernels"):
        assert word in output


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="cpu_capability: instruction set 'sse9'"):
        fastkd.cpu_capability("sse9")


def test_missing_library_says_what_to_do(tmp_path):
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(fastkd.__file__).parent, tmp_path / "fastkd", ignore=unbuilt)
    found = subprocess.run(
        [sys.executable, "-c", "import fastkd"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode != 0
    assert "pip install --no-build-isolation -e ." in found.stderr


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_docstring_examples():
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "--doctest-modules", "-q", ROOT / "fastkd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout


def test_source_files_are_read_in_one_sitting():
    for folder in ("csrc", "fastkd", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
                assert len(path.read_text().splitlines()) <= 500, path
