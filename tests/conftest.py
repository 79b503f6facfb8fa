"""Backends, devices and the --slow switch, shared by every test."""

import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import emulator
import pytest
import stores
import torch

import fastkd
from fastkd._ops.library import usable_instruction_sets
from fastkd.acm import _kernels

# For `benchmarks`; last, so that `fastkd` is the installed one, or that of PYTHONPATH.
sys.path.append(str(Path(__file__).parents[1]))
# The folder that fastkd must come from: set where other kernels than the installed ones are tested.
if (expected := os.environ.get("FASTKD_TESTED_FOLDER")) is not None:
    assert Path(fastkd.__file__).is_relative_to(Path(expected).resolve()), fastkd.__file__

CPU = [f"cpu-{name}" for name in usable_instruction_sets()]  # best first
# The CUDA kernels run on the CPU, as a device that has clusters of blocks and as one that has none.
SIMT = ["simt-90", "simt-80"] if emulator.is_built() else []
CUDA = ["cuda"] if torch.cuda.is_available() else []
BACKENDS = CPU + SIMT + CUDA
# Every test runs on these, and on one of the others, in turn; on all of them with --backends all.
ALWAYS = CPU[:1] + SIMT[:1] + CUDA
IN_TURN = [x for x in BACKENDS if x not in ALWAYS]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what needs many gigabytes")
    parser.addoption(
        "--backends",
        help="comma-separated names, or all, best, cpu, simt, cuda; NAME/3: with a third of the "
        "tests; default: the best CPU kernels, sm_90, a GPU where there is one, and for each test "
        "one of the others in turn",
    )
    parser.addoption(
        "--fuzz-seconds", type=float, default=1.0, help="of each op on each backend (test_fuzz.py)"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the first random problem")
    parser.addoption("--schedule", type=int, default=0, help="seed of the emulated threads' order")
    parser.addoption(
        "--rounding",
        type=int,
        default=0,
        help="seed of rounding errors as a GPU's in the emulated kernels; 0: none",
    )


def pytest_configure(config):
    emulator.rounding = config.getoption("--rounding")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--backends")
        groups = {"all": BACKENDS, "best": BACKENDS[:1], "cpu": CPU, "simt": SIMT, "cuda": CUDA}
        parts = [x.split("/")[0] for x in wanted.split(",")] if wanted else ["all"]
        names = [name for part in parts for name in groups.get(part, [part])]
        metafunc.parametrize("backend", names, indirect=True)


def _is_its_turn(item, shares):
    """Whether the test runs on its backend.

    shares: backends that run one in so many tests. None: those IN_TURN share the tests.
    """
    backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    if backend not in (IN_TURN if shares is None else shares):
        return True
    number = zlib.crc32(item.nodeid.replace(backend, "").encode())
    if shares is None:
        return backend == IN_TURN[number % len(IN_TURN)]
    return number % shares[backend] == 0


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--backends")
    pairs = [] if wanted is None else [x.split("/") for x in wanted.split(",") if "/" in x]
    shares = None if wanted is None else {name: int(number) for name, number in pairs}
    if not any("::" in x for x in config.args):
        kept = {item: _is_its_turn(item, shares) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not kept[item]])
        items[:] = [item for item in items if kept[item]]
    # Files run side by side: first the one that waits for nvcc, then the longest.
    tests = Counter(item.path for item in items)
    items.sort(key=lambda x: (x.path.name != "test_cuda_build.py", -tests[x.path], x.path))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_setup(item):
    """Leave out what a backend does not have: `@pytest.mark.only("cpu", ...)`."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kind = parameters.get("backend", "cpu").split("-")[0]
    if kind != "cpu" and torch.float64 in parameters.values():
        pytest.skip("float64 is for the CPU")
    for mark in item.iter_markers("only"):
        if kind not in mark.args:
            pytest.skip(f"not for {kind}")


@pytest.fixture
def backend(request, monkeypatch):
    """The implementation under test, as a device; whatever it switches is switched back."""
    kind, _, which = request.param.partition("-")
    if kind == "cuda":
        with torch.device("cuda"):  # where tests make their tensors
            yield torch.device("cuda")
        return
    if kind == "simt":
        # "simt-90-refused": a device that refuses clusters; it has to be asked for by --backends.
        capability, _, refused = which.partition("-")
        schedule = request.config.getoption("--schedule")
        emulator.configure(int(capability), schedule, clusters=not refused)
        monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)
        half = (torch.bfloat16, torch.float16)
        monkeypatch.setitem(_kernels.DTYPES, "cpu", (torch.float32, *half))
        yield torch.device("cpu")
        return
    chosen = fastkd.cpu_capability()
    fastkd.cpu_capability(which)
    yield torch.device("cpu")
    fastkd.cpu_capability(chosen)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def three_shards(tmp_path):
    """Shards of two sequences, 150 tokens each."""
    with fastkd.TeacherStore.create(tmp_path, vocab_size=1000, k=4, shard_tokens=300) as writer:
        for i in range(6):
            writer.append(*stores.numbered(i, 150))
    return tmp_path
