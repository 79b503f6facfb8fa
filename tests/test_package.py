"""The package as installed: the library's symbols, its command, its house rules."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd._ops import library

ROOT = Path(__file__).parent.parent
LIBRARY = library._PATH


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


def sources(folder, version):
    """A folder of fastkd's sources, not built."""
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(fastkd.__file__).parent, folder / "fastkd", ignore=unbuilt)
    project = (ROOT / "pyproject.toml").read_text()
    project = project.replace(f'version = "{fastkd.__version__}"', f'version = "{version}"')
    (folder / "pyproject.toml").write_text(project)
    return folder


def installed(folder):
    """A folder like site-packages, with this fastkd."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(LIBRARY.parent, folder / "fastkd", ignore=ignored)
    about = folder / f"fastkd-{fastkd.__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: fastkd\nVersion: {fastkd.__version__}\n")
    return folder


def run_in(folder, *paths, program):
    return subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env={"PYTHONPATH": ":".join(map(str, (folder, *paths)))},
        capture_output=True,
        text=True,
    )


def test_missing_library_says_what_to_do(tmp_path):
    found = run_in(sources(tmp_path, "9.9"), program=["-c", "import fastkd"])
    assert found.returncode != 0
    assert "pip install --no-build-isolation -e ." in found.stderr


def test_the_source_folder_uses_what_is_installed(tmp_path):
    """docs/install.md: `pip install .`, and then `python -m fastkd` in the same folder."""
    (tmp_path / "site").mkdir()
    folder, site = sources(tmp_path / "sources", fastkd.__version__), installed(tmp_path / "site")
    found = run_in(folder, site, program=["-m", "fastkd"])
    assert found.returncode == 0, found.stderr
    assert str(site / "fastkd" / "_C.so") in found.stdout
    program = "import fastkd; print(fastkd.__file__, fastkd.ByteVocab([b'a']).tokens)"
    found = run_in(folder, site, program=["-c", program])
    assert found.stdout.split() == [str(folder / "fastkd" / "__init__.py"), "[b'a']"]


def test_what_is_installed_is_another_version(tmp_path):
    (tmp_path / "site").mkdir()
    folder, site = sources(tmp_path / "sources", "9.9"), installed(tmp_path / "site")
    found = run_in(folder, site, program=["-c", "import fastkd"])
    assert found.returncode != 0
    assert f"{site}/fastkd has version {fastkd.__version__}" in found.stderr
    assert "sources have 9.9" in found.stderr


def test_the_version_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{fastkd.__version__}"\n' in text
    others = [*ROOT.glob("fastkd/**/*.py"), ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    assert not [path for path in others if f'"{fastkd.__version__}"' in path.read_text()]


def test_source_distribution(tmp_path):
    """All that the build reads, and the tests; nothing that was built."""
    pytest.importorskip("setuptools", minversion="77")
    names = ("csrc", "fastkd", "tests", "benchmarks", "examples", "docs")
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__", "results", "output")
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unbuilt)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "fastkd" / "_C.so").touch()
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("fastkd-*.tar.gz")
    with tarfile.open(archive) as content:
        found = {name.partition("/")[2] for name in content.getnames()}
    assert archive.name == f"fastkd-{fastkd.__version__}.tar.gz"
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".typed", ".png", ".md", ".js")
    wanted = {
        str(path.relative_to(tmp_path))
        for name in names
        for path in (tmp_path / name).rglob("*")
        if path.suffix in suffixes or path.name == "py.typed"
    }
    files = {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"}
    files |= {"benchmarks/gpu_report.sh", "tests/op_tests.txt", "tests/gpu_report_sample.json"}
    files |= {"mkdocs.yml"}
    assert wanted | files <= found
    assert {"csrc/library.cpp", "csrc/cuda/gated_routing.cu", "tests/simt/simt.h"} <= found
    assert not [name for name in found if name.endswith((".so", ".pyc", ".o"))]


def test_warnings_stop_no_build_but_the_developers():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert text.count("-Werror") == 1
    assert re.search(r"option\(FASTKD_WERROR .* OFF\)", text)
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("-DFASTKD_WERROR=on") == 3  # installed, sanitized, emulated


def test_docstring_examples():
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "--doctest-modules", "-q", ROOT / "fastkd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout


def test_source_files_are_read_in_one_sitting():
    for folder in ("csrc", "fastkd", "tests", "benchmarks", "examples", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
                assert len(path.read_text().splitlines()) <= 500, path
