"""What nvcc makes of the kernels: no warning, no spill, wide accesses, one loadable library.

For sm_90, which has the most code, by default; for all architectures with --slow.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ALL_DIVERGENCES
from kernel_limits import KIB_WANTED, LIMITS

from benchmarks.predicted_loops import Recorded, record
from benchmarks.predicted_ops import OPS
from benchmarks.predicted_time import GPUS, ROWS, VOCAB, Prediction, load, predict, sources_hash
from benchmarks.sass import disassemble, find_tool, registers
from benchmarks.sass_code import parse

ROOT = Path(__file__).parent.parent
SOME, ALL = ["90"], ["75", "80", "86", "89", "90", "100", "120"]
ROW_THREADS, BLOCKS, REGISTERS = 192, 2, 65536
# Row kernels, each for four kinds of source: softmax_divergence's, and the others'; those that read
# two tensors of logits, which may differ in dtype, also for a fifth.
KERNELS, MIXED = len(ALL_DIVERGENCES) + 16, len(ALL_DIVERGENCES) + 2
SEVERAL = {"cross_entropy": 12, "token_log_probs": 8, "token_gradient": 8}

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
    state = sources_hash()
    log, mark = folder / "build.log", folder / "sources.sha256"
    if not mark.exists() or mark.read_text() != state:
        shutil.rmtree(folder, ignore_errors=True)
        run(
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DFASTKD_CUDA=on"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTKD_CUDA_ARCHS={';'.join(architectures)}",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # the CPU kernels only have to be linked
        )
        log.write_text(run("cmake", "--build", folder, "--target", "_C", "--verbose"))
        mark.write_text(state)
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
    for divergence in ALL_DIVERGENCES:
        divergence = divergence.title().replace("_", "")
        mine = [name for name in names if re.search(rf"\d{divergence}E", name)]
        assert len(mine) == 5, divergence  # three dtypes in packs; two of them; any other
    compiled = {architecture for name, architecture, *_ in functions if name in names}
    assert compiled - {""} == set(architectures)
    for kernel in (
        *("topk_divergence", "teacher_topk", "token_stats", "clipped_divergence"),
        *("chunk_log_likelihood", "chunk_gradient", "token_log_probs", "token_gradient"),
        "cross_entropy",
        *("byte_log_probs", "byte_log_probs_backward"),
    ):
        found = {name for name, *_ in functions if f"{kernel}_kernel" in name}
        # token_stats: of a pair, and of one; the others without an entropy, and with it
        expected = {"token_stats": 9, "clipped_divergence": 5, **SEVERAL}.get(kernel, 4)
        assert len(found) == expected, kernel
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
    assert len(rows) == (KERNELS * 4 + MIXED) * len(architectures)
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


needs_cuobjdump = pytest.mark.skipif(
    not (find_tool("cuobjdump") and find_tool("nvdisasm")),
    reason="needs cuobjdump and nvdisasm (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)",
)


@pytest.fixture(scope="module")
def code(build):
    """By name, the instructions of the kernels for sm_90."""
    return parse(disassemble(build[0], "sm_90"))


@needs_cuobjdump
def test_row_loops_move_16_bytes_at_a_time(code):
    packed = {name: x for name, x in code.items() if "_kernelI" in name and "PackedSource" in name}
    assert len(packed) == KERNELS * 3 + MIXED
    no_rows = "token_stats|teacher_topk|(chunk_log_likelihood|(byte|token)_log_probs)_kernel"
    for name, instructions in packed.items():
        assert any(x.load16 or x.copy16 for x in instructions), name
        assert re.search(no_rows, name) or any(x.store16 for x in instructions), name


@needs_cuobjdump
def test_no_access_to_local_memory(code):
    used = {name: sum(x.local for x in instructions) for name, instructions in code.items()}
    assert {name: n for name, n in used.items() if n} == {}


# --- What the kernels may cost --------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(build, code) -> dict[str, list[Recorded]]:
    """By op and dtype, the counts of its kernels in this build."""
    found = record(code, registers(build[0], "sm_90"))
    return {
        f"{op}, {dtype}": [Recorded.from_json(x) for x in parts]
        for op, each in found.items()
        for dtype, parts in each.items()
    }


def predicted(key: str, recorded: dict[str, list[Recorded]], gpu: str = "H200") -> Prediction:
    name, _, dtype = key.rpartition(", ")
    launches = load()[1][name, dtype, GPUS[gpu].capability]
    return predict(OPS[name], dtype, GPUS[gpu], ROWS, VOCAB, recorded[key], launches)


def test_every_op_has_limits():
    """A new divergence may do without."""
    names = {key.rpartition(", ")[0] for key in LIMITS}
    assert {OPS[name].group for name in names} == {op.group for op in OPS.values()}


@needs_cuobjdump
@pytest.mark.parametrize("key", LIMITS)
def test_kernels_stay_within_their_limits(key, recorded):
    found, limit = predicted(key, recorded), LIMITS[key]
    assert found.instructions <= limit.instructions[0]
    assert found.of_roof >= limit.of_roof[0]
    assert found.under_way >= limit.kib_under_way * 1024
    assert found.checked <= limit.checked


@needs_cuobjdump
def test_recorded_instructions_are_those_of_the_kernels(recorded):
    """Else: python -m benchmarks.predicted_time --record. Compilers differ a little."""
    kept = {f"{op}, {dtype}": x for op, each in load()[0].items() for dtype, x in each.items()}
    for key in kept:
        before, now = predicted(key, kept), predicted(key, recorded)
        assert now.instructions == pytest.approx(before.instructions, rel=0.05), key
        assert now.mufu == pytest.approx(before.mufu, rel=0.05), key


# --- sm_80: no clusters, each pass reads the rows again -------------------------------------------

KERNEL = (
    "template __global__ void softmax_divergence_kernel<{}, PackedSource<{}>>"
    "(const __grid_constant__ RowArguments, const RowLaunch);"
)
#: Instructions an entry, and KiB under way, on an A100, as in LIMITS. More instructions than on
#: sm_90: each pass copies the rows.
LIMITS_SM_80 = {
    "softmax_divergence forward_kl, bfloat16": (39.5, KIB_WANTED),
    "softmax_divergence forward_kl, float32": (47, KIB_WANTED),
    "softmax_divergence jsd, bfloat16": (77.7, 27),
    "softmax_divergence jsd, float32": (95.3, 27),
}


@pytest.fixture(scope="module")
def recorded_of_sm_80(tmp_path_factory):
    """Some kernels, compiled alone: all of them would take minutes more."""
    folder = tmp_path_factory.mktemp("sm_80")
    kernels = [KERNEL.format(d, t) for d in ("ForwardKl", "Jsd") for t in ("BFloat16", "float")]
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    header = f'#include "{ROOT}/csrc/cuda/softmax_divergence.cuh"'
    source.write_text("\n".join([header, "namespace fastkd::cuda {", *kernels, "}"]))
    options = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--fmad=false", "-arch=sm_80"]
    include = Path(torch.__file__).parent / "include"
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}"]
    run("nvcc", *options, "-cubin", source, "-o", cubin)
    names = {key.rpartition(", ")[0] for key in LIMITS_SM_80}
    ops = {name: replace(OPS[name], mixed=False) for name in names}
    found = record(parse(disassemble(cubin)), registers(cubin), ops)
    return {
        f"{op}, {dtype}": [Recorded.from_json(x) for x in parts]
        for op, each in found.items()
        for dtype, parts in each.items()
    }


@needs_cuobjdump
@pytest.mark.parametrize("key", LIMITS_SM_80)
def test_kernels_of_sm_80_stay_within_their_limits(key, recorded_of_sm_80):
    found = predicted(key, recorded_of_sm_80, "A100")
    instructions, kib_under_way = LIMITS_SM_80[key]
    assert found.instructions <= instructions
    assert found.under_way >= kib_under_way * 1024
    assert found.checked == 0
    assert all(part.local == 0 for part in recorded_of_sm_80[key])
