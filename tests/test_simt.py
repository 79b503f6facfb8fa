"""The emulator that runs CUDA kernels on the CPU: each planted fault is reported, no other."""

import ctypes
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import pytest
import torch

SOURCES = Path(__file__).parent / "simt"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread"]
FLAGS += ["-Wno-unknown-pragmas", "-DFASTKD_SIMT", f"-I{SOURCES}"]
BUILDS = {
    "plain": [],
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "ucontext": ["-DSIMT_UCONTEXT"],
}

CORRECT = [
    "block_reduction",
    "cluster_exchange",
    "two_dimensions",
    "atomics",
    "early_exit",
    "warp_operations",
    "asynchronous_copies",
    "bulk_copies",
    "matrix_fragments",
    "os_threads",
    "with_barrier",
    "syncwarp_orders",
    "bytes_apart",
]

# What every schedule reports.
FAULTS = {
    "missing_barrier": r"thread \d+: (race: it reads|shared read at offset \d+, which was never)",
    "shuffle_does_not_order": r"thread \d+: race: it reads shared offset \d+, written by block 0",
    "overwrite": r"thread \d+: race: it (writes|reads) shared offset 0, (read|written) by",
    "peer_race": r"(race: it reads shared offset \d+, written by block 1|never written)",
    "half_warp_shuffle": r"(exits, but lane \d+ waits for it|names lane \d+, which has exited)",
    "half_warp_never_arrives": (
        r"deadlock: 128 threads wait at a block barrier \(block 0, thread 16\), "
        r"128 threads wait at a warp operation with mask ffffffff \(block 0, thread 0\)"
    ),
    "exited_lane": r"(lane 5 exits, but lane \d+ waits|names lane 5, which has exited)",
    "wrong_mask": r"mask 0000ffff leaves out its own lane (1[6-9]|2\d|3[01])$",
    "wrong_source": r"shuffle with mask 0000ffff reads lane 20, which the mask leaves out",
    "missing_source": r"thread 32: shuffle with mask ffffffff reads lane 1, which the block does",
    "mixed_operations": r"mask ffffffff meets a different one of lane \d+",
    "overlapping_masks": r"deadlock: .*; lanes 0 and 16 of one warp wait with different, over",
    "past_shared": r"255: shared write of 4 bytes at offset 1024 is outside the block's 1024",
    "unwritten": r"shared read at offset 28, which was never written",
    "stale": r"block 1, thread \d+: shared read at offset \d+, which was never written",
    "barriers_apart": (
        r"deadlock: 100 threads wait at a block barrier \(block 1, thread 0\), "
        r"412 threads wait at a cluster barrier \(block 0, thread 0\)"
    ),
    "peer_exits": r"block 0, thread \d+: the shared memory of cluster block 1 is gone",
    "peer_exits_late": r"the shared memory of cluster block 1 is gone: it has exited",
    "rank_out_of_range": r"in_peer: rank 2 in a cluster of 2",
    "not_shared": r"in_peer: the pointer is not in the block's shared memory",
    "odd_width": r"an access to global memory of 12 bytes",
    "copy_not_waited_for": r"shared read at offset \d+, which a copy not yet waited for is to",
    "copy_of_another_group": r"shared read at offset \d+, which a copy not yet waited for is to",
    "copy_without_barrier": (
        r"(race: it reads shared offset \d+, written by block 0"
        r"|shared read at offset \d+, which (was never written|a copy not yet waited for))"
    ),
    "copy_over_what_is_read": (
        r"(race: it (writes|reads) shared offset \d+, (read|written) by"
        r"|shared read at offset \d+, which a copy not yet waited for)"
    ),
    "copy_stored_over": r"shared write at offset \d+, which a copy not yet waited for is to write",
    "copy_over_a_copy": r"shared write at offset \d+, which a copy not yet waited for is to write",
    "copy_of_what_changes": r"the source of an asynchronous copy has changed before the copy",
    "copy_left_behind": r"exits with 1 asynchronous copies not waited for",
    "copy_off_a_line": r"an asynchronous copy off a 16-byte boundary",
    "copy_off_8_bytes": r"an asynchronous copy off a 8-byte boundary",
    "bulk_not_waited_for": r"shared read at offset \d+, which (a copy not yet waited|was never)",
    "bulk_too_few_bytes": (
        r"deadlock: 256 threads wait for phase 0 of the mbarrier at shared offset 0, which has 1 "
        r"of 1 arrivals and 4096 of 4112 bytes \(block 0, thread \d+\)"
    ),
    "bulk_too_many_bytes": r"4096 bytes were copied for the mbarrier at .* 0, which expects 4080",
    "bulk_nobody_arrives": r"deadlock: 256 threads wait .*, which has 0 of 1 arrivals and 0 of 0 b",
    "bulk_wrong_parity": r"waits for the other parity than that of phase 1 of the .* has begun",
    "bulk_parity_before_all": r"waits for parity 1 of the mbarrier at .* before its first phase",
    "bulk_arrives_twice": r"thread 0: arrives at the mbarrier .* whose phase 0 has not completed",
    "bulk_arrives_again": r"thread 0: arrives at the mbarrier .* whose phase 0 has not completed",
    "bulk_off_a_line": r"a bulk copy of 2048 bytes off a 16-byte boundary",
    "bulk_source_off_a_line": r"a bulk copy of 2048 bytes off a 16-byte boundary",
    "bulk_odd_size": r"a bulk copy of 24 bytes off .* or of a size that is no multiple of 16",
    "bulk_no_mbarrier": r"no mbarrier was initialised at shared offset 0",
    "bulk_mbarrier_twice": r"shared write at offset 0, where an mbarrier lies",
    "bulk_mbarrier_not_fenced": r"the mbarrier at shared .*, whose initialisation was not fenced",
    "bulk_mbarrier_not_shared": (
        r"(race: it uses the mbarrier at shared offset 0, initialised by block 0, thread 0 with no"
        r"|no mbarrier was initialised at shared offset 0)"
    ),
    "bulk_mbarrier_stored_over": r"shared write at offset 0, where an mbarrier lies",
    "bulk_over_unfenced": r"overwrites shared offset 32, written by block 0, thread 1 without a",
    "bulk_fenced_early": r"a bulk copy overwrites shared offset \d+, written by .* without a fence",
    "bulk_outside": r"a bulk copy of 4096 bytes leaves the block's shared memory",
    "bulk_over_a_copy": r"shared write at offset 32, which a copy not yet waited for is to write",
    "bulk_over_what_is_read": (
        r"(race: it (writes|reads) shared offset \d+, (read|written) by"
        r"|shared read at offset \d+, which a copy not yet waited for)"
    ),
    "bulk_stored_over": r"shared write at offset \d+, which a copy not yet waited for is to write",
    "bulk_of_what_changes": r"the source of a bulk copy has changed before the copy was waited for",
    "bulk_left_behind": r"exits with 1 bulk copies not waited for at the mbarrier at shared offset",
    "bulk_others_wait": (
        r"(race: it reads shared offset \d+, written by a bulk copy that block 0, thread 40 has wai"
        r"|shared read at offset \d+, which (was never written|a copy not yet waited for))"
    ),
    "mixed_work": r"mask ffffffff meets a different one of lane \d+",
    "work_of_a_part": r"an operation of a whole warp in a warp of fewer lanes",
}

GOOD, VALUE, CONFIGURATION = "no error", "invalid argument", "invalid configuration argument"
LIMITS = {
    "block 1024": (GOOD, GOOD),
    "block 1025": (CONFIGURATION, CONFIGURATION),
    "block 32 x 33": (CONFIGURATION, CONFIGURATION),
    "grid 0": (CONFIGURATION, CONFIGURATION),
    "grid.x 2^31": (CONFIGURATION, CONFIGURATION),
    "grid.y 65536": (CONFIGURATION, CONFIGURATION),
    "48 KiB": (GOOD, GOOD),
    "49 KiB": (VALUE, VALUE),
    "allow 227 KiB": (GOOD, VALUE),
    "227 KiB": (GOOD, VALUE),
    "allow 228 KiB": (VALUE, VALUE),
    "cluster 8": (GOOD, CONFIGURATION),
    "cluster 16": (CONFIGURATION, CONFIGURATION),
    "allow 16": (GOOD, GOOD),
    "cluster 16 allowed": (GOOD, CONFIGURATION),
    "cluster 17": (CONFIGURATION, CONFIGURATION),
    "grid 6 by cluster 4": (CONFIGURATION, CONFIGURATION),
}
OPT_IN_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The executable of each build; a compiler without the sanitizers' libraries gives none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("simt")

    def build(name):
        command = [compiler, *FLAGS, *BUILDS[name], SOURCES / "faults.cpp", SOURCES / "simt.cpp"]
        finished = subprocess.run([*command, "-o", folder / name], capture_output=True, text=True)
        if re.search(r"cannot find \S*l[au]b?san", finished.stderr):
            return None
        assert finished.returncode == 0, finished.stderr
        return folder / name

    with ThreadPoolExecutor() as pool:
        return dict(zip(BUILDS, pool.map(build, BUILDS), strict=True))


@pytest.fixture(scope="session", params=BUILDS)
def faults(request, programs):
    """Runs a case in one of the builds: exit code and what it printed."""
    program = programs[request.param]
    if program is None:
        pytest.skip("g++ has no sanitizers here")

    def run(*arguments):
        finished = subprocess.run(
            [program, *map(str, arguments)],
            env={"ASAN_OPTIONS": "detect_stack_use_after_return=1"},
            capture_output=True,
            text=True,
        )
        return finished.returncode, finished.stdout + finished.stderr

    run.sanitized = request.param == "sanitized"
    return run


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass(faults, case):
    for seed in range(5):
        assert faults(case, seed) == (0, ""), seed


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_reported(faults, case):
    for seed in range(5):
        code, report = faults(case, seed)
        assert code == 3, report
        assert report.startswith("simt: ")
        assert len(report.splitlines()) == 1
        assert re.search(FAULTS[case], report.strip()), report


def test_a_seed_is_reproducible(faults):
    reports = [faults("missing_barrier", seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1] != reports[2]


def test_a_missing_barrier_gives_wrong_values(faults):
    """What a kernel's own test sees where the kernel reports no accesses."""
    assert faults("unseen_missing_barrier", 1) == (1, "wrong: neighbour\n")


@pytest.mark.parametrize("case", ["past_global", "unseen_past_shared", "bulk_past_global"])
def test_address_sanitizer_sees_kernels(faults, case):
    if not faults.sanitized:
        pytest.skip("a sanitizer's finding")
    code, report = faults(case)
    assert code not in (0, 3)
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert re.search(r"#\d .* in .*(read_at|past_shared|bulk_copy)", report)


def test_bulk_copies_before_sm_90(faults):
    code, report = faults("bulk_copies", 0, 80)
    assert code == 3
    assert "mbarriers with bulk copies exist from sm_90 on" in report


@pytest.mark.parametrize("capability", OPT_IN_KIB)
def test_launch_limits(faults, capability):
    code, report = faults("limits", 0, capability)
    assert code == 0, report
    *lines, device = report.splitlines()
    column = 0 if capability == 90 else 1
    assert dict(line.split(": ") for line in lines) == {k: v[column] for k, v in LIMITS.items()}
    assert device == f"device {capability / 10}: {OPT_IN_KIB[capability]} KiB"


def test_traffic_is_counted_by_width(faults):
    """The case copies 32 items in each block: 1 block of char, 2 of short, ... 5 of uint4."""
    by_width = [32 * blocks * width for blocks, width in enumerate((1, 2, 4, 8, 16), start=1)]
    total, widest = sum(by_width), by_width[-1]
    code, report = faults("traffic")
    assert code == 0
    assert report.splitlines() == [
        f"read {total} written {total} read_16 {widest} written_16 {widest} "
        "launches 6 cluster 2 shared 4096",
        "by width " + " ".join(map(str, by_width)),
    ]


# --- A GPU's rounding errors ----------------------------------------------------------------------

# In units in the last place of the result, once it is rounded.
UNITS = {"exp2": 2, "log2": 1, "exp2_approx": 2}
HALF_UNIT = 2.0**-24  # of a result in [1, 2)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The functions of rounded.h in float32: rounded(name, x, seed)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    path = tmp_path_factory.mktemp("rounded") / "rounded.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, SOURCES / "rounded.cpp", "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.simt_rounded.restype = ctypes.c_float

    def run(name, x, seed=1):
        library.simt_round(ctypes.c_uint(seed))
        values = [library.simt_rounded(name.encode(), ctypes.c_float(v)) for v in x.tolist()]
        return torch.tensor(values, dtype=torch.float32)

    return run


def uniform(low, high, count=20_000):
    return torch.empty(count).uniform_(low, high)


@pytest.mark.parametrize("name", UNITS)
def test_functions_are_units_in_the_last_place_off(rounded, name):
    x = uniform(0.6, 1.5) if name == "log2" else uniform(-125, 125)
    exact = getattr(torch, name.removesuffix("_approx"))(x.double()).float()
    units = rounded(name, x).view(torch.int32) - exact.view(torch.int32)
    found, counts = units.unique(return_counts=True)
    assert found.tolist() == list(range(-UNITS[name], UNITS[name] + 1))
    assert counts.min() > 0.9 * len(x) / len(found)


def test_errors_of_the_approximations(rounded):
    """Relative to 1 or to the result; each bound is nearly reached."""
    x = uniform(0.5, 2)
    error = (rounded("log2_approx", x).double() - x.double().log2()).abs()
    assert 0.99 * 2**-22.6 < error.max() < 2**-22.6 + HALF_UNIT
    for name, low, high, bound in (
        ("log2_approx", 2, 1e30, 2**-22),
        ("reciprocal_approx", 1e-30, 1e30, 2**-23),
    ):
        x = 2 ** uniform(math.log2(low), math.log2(high))
        exact = x.double().log2() if name == "log2_approx" else 1 / x.double()
        error = (rounded(name, x).double() / exact - 1).abs()
        assert 0.9 * bound < error.max() < bound + HALF_UNIT


def test_what_has_no_error(rounded):
    inf, tiny = math.inf, 1e-40
    for name, cases in {
        "exp2": {0: 1, -inf: 0, inf: inf, 200: inf, -200: 0},
        "log2": {1: 0, 0: -inf, inf: inf},
        "exp2_approx": {0: 1, -inf: 0, inf: inf, tiny: 1, -126.5: 0},
        "log2_approx": {1: 0, 0: -inf, inf: inf, tiny: -inf},
        "reciprocal_approx": {0: inf, inf: 0, tiny: inf, 3e38: 0},
    }.items():
        for x, right in cases.items():
            assert rounded(name, torch.tensor([x], dtype=torch.float32)).item() == right, (name, x)
        assert rounded(name, torch.tensor([math.nan])).isnan().all()
    assert 0 < rounded("exp2", torch.tensor([-126.5])).item() < 2**-126


def test_errors_depend_on_the_argument_and_the_seed_alone(rounded):
    x = uniform(-3, 3, 1000)
    first, again, other = (rounded("exp2", x, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.7


@pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")
def test_contracted_functions_are_not_those_that_nvcc_does_not_contract():
    """What several files instantiate is there twice: `.own` in the files without contraction."""
    symbols = subprocess.run(
        ["nm", emulator.PATH.with_name("_simt_rounded.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    own = {x.removesuffix(".own") for x in symbols if x.endswith(".own")}
    assert any("first_pass" in x for x in own & set(symbols))
