"""What nvcc makes of the kernels: no warning, no spill, wide accesses, one loadable library.

For sm_90, which has the most code, by default; for all architectures with --slow.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import DIVERGENCES

ROOT = Path(__file__).parent.parent
SOME, ALL = ["90"], ["75", "80", "86", "89", "90", "100", "120"]
ROW_THREADS, BLOCKS, REGISTERS = 192, 2, 65536
# softmax_divergence's, the others', each for four kinds of source
KERNELS = len(DIVERGENCES) + 9

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def architectures(request):
    return ALL if request.config.getoption("--slow") else SOME


@pytest.fixture(scope="module")
def build(architectures):
    """The library with CUDA kernels and what the compiler said, kept until a source changes."""
    folder = ROOT / "build" / f"cuda_{len(architectures)}"
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    state = hashlib.sha256(b"".join(p.read_bytes() for p in (ROOT / "CMakeLists.txt", *sources)))
    log, mark = folder / "build.log", folder / "sources.sha256"
    if not mark.exists() or mark.read_text() != state.hexdigest():
        shutil.rmtree(folder, ignore_errors=True)
        run(
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DFASTKD_CUDA=on"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTKD_CUDA_ARCHS={';'.join(architectures)}",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # the CPU kernels only have to be linked
        )
        log.write_text(run("cmake", "--build", folder, "--target", "_C", "--verbose"))
        mark.write_text(state.hexdigest())
    return folder / "_C.so", log.read_text()


@pytest.fixture(scope="module")
def functions(build):
    """(function, architecture, bytes of stack and spills, registers) as ptxas reports them."""
    found, name, architecture, bytes_used = [], "", "", 0
    for line in build[1].splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, architecture = match.groups()
        elif match := re.search(r"Function properties for (\w+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            bytes_used = sum(int(number) for number in match.groups())
            found.append((name, architecture, bytes_used, 0))
        elif match := re.search(r"Used (\d+) registers", line):
            found.append((name, architecture, 0, int(match[1])))
    return found


@pytest.mark.timeout(1500)
def test_every_kernel_is_there(functions, architectures):
    names = {name for name, *_ in functions if "softmax_divergence_kernel" in name}
    for divergence in DIVERGENCES:
        divergence = divergence.title().replace("_", "")
        mine = [name for name in names if re.search(rf"\d{divergence}E", name)]
        assert len(mine) == 4, divergence  # three dtypes in packs; any other
    compiled = {architecture for name, architecture, *_ in functions if name in names}
    assert compiled - {""} == set(architectures)
    for kernel in (
        *("topk_divergence", "teacher_topk", "token_stats", "clipped_divergence"),
        *("chunk_log_likelihood", "chunk_gradient"),
        *("byte_log_probs", "byte_log_probs_backward"),
    ):
        found = {name for name, *_ in functions if f"{kernel}_kernel" in name}
        assert len(found) == (8 if kernel == "token_stats" else 4), kernel  # of a pair, or of one
    assert any("kl_div_kernel" in name for name, *_ in functions)
    # Gated routing's: three dtypes, for sm_75 and for what came later, empty where not meant.
    for kernel, tiles in (("learner", 3), ("sum", 3), ("weight", 2)):
        found = {name for name, *_ in functions if re.search(rf"\d{kernel}_kernelI", name)}
        assert len(found) == 3 * 2 * tiles, kernel
    assert len({name for name, *_ in functions if "acm_route_kernel" in name}) == 2


def test_no_warnings(build):
    assert not [line for line in build[1].splitlines() if "warning" in line.lower()]


def test_no_spills_and_no_local_memory(functions):
    assert not [(name, sm, used) for name, sm, used, _ in functions if used]


def test_registers_leave_room_for_the_blocks_of_the_policy(functions, architectures):
    # Each of a multiprocessor's four parts has its own registers, given out in eights.
    warps = -(-BLOCKS * ROW_THREADS // 32 // 4)
    limit = REGISTERS // 4 // 32 // warps // 8 * 8
    rows = [f for f in functions if "Source" in f[0] and f[3]]
    assert len(rows) == KERNELS * 4 * len(architectures)
    assert not [f for f in rows if f[3] > limit]


def test_library_loads_without_cuda(build, architectures):
    """The stream function is weak, the CUDA runtime inside: torch without CUDA can load it."""
    library, _ = build
    symbols = run("nm", "--dynamic", library)
    assert re.search(r"^ +w aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE)
    assert not re.search(r" U cuda\w+", symbols)
    assert "libcudart" not in run("readelf", "--dynamic", library)
    code = f"import torch; torch.ops.load_library({str(library)!r}); "
    found = run(sys.executable, "-c", code + "print(torch.ops.fastkd._cuda_architectures())")
    assert found.split() == architectures


def _tool(name):
    """Of the CUDA toolkit, or of NVIDIA's packages on PyPI."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in Path(folder).rglob(name):
            return str(path)
    return None


CUOBJDUMP, NVDISASM = _tool("cuobjdump"), _tool("nvdisasm")


@pytest.mark.skipif(
    not (CUOBJDUMP and NVDISASM),
    reason="needs cuobjdump and nvdisasm (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)",
)
def test_row_loops_move_16_bytes_at_a_time(build):
    path = f"{Path(NVDISASM).parent}{os.pathsep}{os.environ['PATH']}"
    code = run(CUOBJDUMP, "-sass", "-arch", "sm_90", build[0], env={**os.environ, "PATH": path})
    kernels = re.split(r"\n\s*Function : ", code)[1:]
    packed = [k for k in kernels if "_kernelI" in k[:200] and "PackedSource" in k[:200]]
    assert len(packed) == KERNELS * 3
    for kernel in packed:
        name = kernel.split("\n", 1)[0]
        assert re.search(r"LDG\.E[.\w]*\.128", kernel), name
        no_rows = "token_stats|teacher_topk|chunk_log_likelihood_kernel|byte_log_probs_kernel"
        if not re.search(no_rows, name):
            assert re.search(r"STG\.E[.\w]*\.128", kernel), name
