"""The report on a GPU as far as it goes without one: the runner, its time limits, what it reads."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import build, counters, op_tests, report, sanitizer, smoke, stage, tables
from benchmarks.gpu import peers as peers_stage
from benchmarks.gpu import times as times_stage

ROOT = Path(__file__).parents[1]
MODULES = {
    "build": build,
    "smoke": smoke,
    "op_tests": op_tests,
    "times": times_stage,
    "counters": counters,
    "sanitizer": sanitizer,
    "peers": peers_stage,
}


def record_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# --- The runner -----------------------------------------------------------------------------------


def test_every_stage_is_run_and_has_a_table():
    names = [s.name for s in report.STAGES]
    assert names == list(MODULES) == list(tables.TABLES)
    assert sum(s.limit for s in report.STAGES) <= 8 * 60


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_says_what_it_lacks(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert MODULES[name].main(["--output", str(tmp_path)]) == 0
    found = record_of(tmp_path, name)
    assert (found["status"], found["rows"]) == ("missing", [])
    assert "a GPU" in found["summary"]


def test_the_script_writes_the_report(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_report.sh", "here", "--only", "counters"],
        cwd=tmp_path,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing ran: each stage lacks something" in done.stdout
    folder = tmp_path / "here"
    content = json.loads((folder / "report.json").read_text())
    assert [(s["stage"], s["status"]) for s in content["stages"]] == [("counters", "missing")]
    assert "missing: a GPU" in (folder / "report.md").read_text()
    assert "counters: missing" in (folder / "counters.log").read_text()


def test_make_downloads_nothing():
    # As from a shell, also where make runs the tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "gpu-report", "GPU_REPORT=there", "PYTHON=python3.99"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ['PYTHON="python3.99"', "benchmarks/gpu_report.sh", '"there"']
    command = build.command(Path("site"))
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(command)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing"],
        ["--limit", "smoke"],
        ["--limit", "smoke=soon"],
        ["--limit", "nothing=3"],
        ["--pass", "nothing=--rows 3"],
    ],
)
def test_wrong_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        report.main([str(tmp_path), *arguments])
    assert raised.value.code == 2
    assert "smoke" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.stage import Record
record = Record(Path(sys.argv[2]) / f"{NAME}.json", NAME)
record.add({"problem": "one"})
record.write()
"""
HANG = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[2], "child").write_text(str(child.pid))
time.sleep(60)
"""
INTERRUPTED = """
from benchmarks.gpu import stage
def body(record, options):
    record.add({"problem": "one"})
    time.sleep(60)
sys.exit(stage.run(NAME, body, stage.options_of("x").parse_args()))
"""


def run_fake(tmp_path, monkeypatch, name, text, limit):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / f"{name}.py").write_text(f"NAME = {name!r}\n{STAGE}\n{text}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    found = report.run_stage(report.Stage(name, limit, "fake"), tmp_path, [], grace=1.0)
    assert time.monotonic() - start < limit + 3
    return found


def is_alive(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_hangs_costs_its_own_time(tmp_path, monkeypatch):
    found = run_fake(tmp_path, monkeypatch, "smoke", HANG, 2.0)
    last = 'last: {"problem": "one"}'
    assert (found["status"], found["summary"]) == ("stopped", f"stopped after 1 results; {last}")
    assert found["rows"] == [{"problem": "one"}]
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_alive(child):
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_stage_that_can_ends_at_an_interrupt(tmp_path, monkeypatch):
    found = run_fake(tmp_path, monkeypatch, "smoke", INTERRUPTED, 2.0)
    assert (found["status"], found["exit"]) == ("stopped", 1)
    assert found["rows"] == [{"problem": "one"}]


def test_a_stage_that_crashes_has_failed(tmp_path, monkeypatch):
    found = run_fake(tmp_path, monkeypatch, "smoke", "os._exit(7)", 20)
    assert found["status"] == "failed"
    assert found["summary"].startswith("ended by 7 after 1 results; last: ")


def test_an_error_is_a_failure_with_its_text(tmp_path):
    def body(record, options):
        raise ValueError("what\nand more")

    options = stage.options_of("x").parse_args(["--output", str(tmp_path)])
    assert stage.run("smoke", body, options) == 1
    found = record_of(tmp_path, "smoke")
    assert (found["status"], found["summary"]) == ("failed", "ValueError: what")


def test_the_build_names_missing_tools(tmp_path, monkeypatch):
    missing = build.missing_tools(str(tmp_path))
    assert {"nvcc", "cmake", "ninja"} <= set(missing)
    versions = {"setuptools": "70.1", "pip": "24.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing = build.missing_tools(str(tmp_path))
    assert {"pybind11", "setuptools>=77 (found 70.1)"} <= set(missing)
    assert "pip" not in missing


# --- What other programs print --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "[gw3] [ 12%] PASSED tests/a.py::test_x[cuda-a b] ",
            ("tests/a.py::test_x[cuda-a b]", "P"),
        ),
        ("[gw0] [100%] FAILED tests/a.py::test_x", ("tests/a.py::test_x", "F")),
        (
            "tests/a.py::test_x[cuda] PASSED                   [  1%]",
            ("tests/a.py::test_x[cuda]", "P"),
        ),
        (
            "tests/a.py::test_x[1] SKIPPED (not for cuda)      [ 50%]",
            ("tests/a.py::test_x[1]", "S"),
        ),
        ("tests/a.py::test_x ERROR", ("tests/a.py::test_x", "E")),
        ("tests/a.py::test_x[cuda] ", None),
        ("FAILED tests/a.py::test_x - AssertionError", None),
        ("E   assert PASSED", None),
    ],
)
def test_pytest_s_lines(line, expected):
    found = op_tests.outcome_of(f"{line}\n")
    assert (found and (found[0], found[1][0])) == expected


def test_pytest_s_reasons():
    match = op_tests.REASON.fullmatch("FAILED tests/a.py::test_x[a - b] - assert 1 == 2 - 3")
    assert match["test"] == "tests/a.py::test_x[a"  # a test's own dash is taken for the reason's
    match = op_tests.REASON.fullmatch("ERROR tests/a.py - ModuleNotFoundError: No module")
    assert (match["test"], match["reason"]) == ("tests/a.py", "ModuleNotFoundError: No module")


CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--backends")
"""
SOME_TESTS = """
import pytest
@pytest.mark.parametrize("x", ["a b", 2, 3])
def test_good(x, request):
    assert request.config.getoption("--backends") == "best"
def test_bad():
    assert 1 == 2
def test_compile():
    raise AssertionError("it is left out")
@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""


def test_op_tests_are_counted(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    file = tmp_path / "test_some.py"
    file.write_text(SOME_TESTS)
    arguments = ["--output", str(tmp_path), "--backends", "best", "--processes", "1"]
    assert op_tests.main([*arguments, str(file)]) == 1
    found = record_of(tmp_path, "op_tests")
    assert found["summary"] == "1 failed, 3 passed, 1 skipped"
    (bad,) = found["rows"]
    assert bad["test"].endswith("::test_bad")
    assert bad["reason"] == "assert 1 == 2"


def test_op_tests_that_do_not_start_are_no_success(tmp_path, monkeypatch):
    said = "ERROR tests/a.py - ModuleNotFoundError: no hypothesis"
    command = [sys.executable, "-c", f"print({said!r})"]
    monkeypatch.setattr(op_tests, "command", lambda *arguments: command)
    assert op_tests.main(["--output", str(tmp_path), "--backends", "best"]) == 1
    found = record_of(tmp_path, "op_tests")
    assert found["summary"] == "no test ran"
    reason = "ModuleNotFoundError: no hypothesis"
    assert found["rows"] == [{"test": "tests/a.py", "reason": reason}]


def test_op_tests_are_those_of_make():
    found = op_tests.files()
    assert len(found) >= 20
    assert all(Path(path).exists() for path in found)
    patterns = (ROOT / "tests" / "op_tests.txt").read_text().split()
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)
    assert "tests/op_tests.txt" in (ROOT / "Makefile").read_text()


CSV = """==PROF== Connected to process 1
"ID","Kernel Name","launch__block_size","gpu__time_duration.sum","dram__bytes_read.sum",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_membar_per_issue_active.ratio","other"
"","","","us","Mbyte","inst","inst","inst","inst","%"
"0","void fastkd::cuda::rows<float, 2>(A)","192","1,234.5","622.1","0.5","3.25","1.5","0","7"
"1","void fastkd::cuda::sum(float *)","1,024","3.1","","0.25","n/a","1.75","0","7"
"""


def test_ncu_s_raw_page():
    first, second = counters.parse(CSV)
    assert first["kernel"] == "void fastkd::cuda::rows<float, 2>"
    assert (first["time"], first["time_unit"], first["threads"]) == (1234.5, "us", 192.0)
    assert first["stalls"] == {"long_scoreboard": 3.25, "wait": 1.5, "barrier": 0.5}
    assert "read" not in second
    assert second["stalls"] == {"wait": 1.75, "barrier": 0.25, "membar": 0.0}
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM - no permission\n") == []


@pytest.mark.parametrize(
    ("program", "text", "expected"),
    [
        ("", "", "ncu (Nsight Compute)"),
        (
            "ncu",
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission",
            "hardware counters",
        ),
        ("ncu", "==WARNING== No kernels were profiled.", None),
    ],
)
def test_ncu_that_cannot(program, text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "require_kernels", lambda: None)
    monkeypatch.setattr(counters, "search_path", lambda: str(tmp_path))
    if program:
        (tmp_path / program).write_text(f"#!/bin/sh\necho '{text}'\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    status = counters.main(["--output", str(tmp_path)])
    found = record_of(tmp_path, "counters")
    if expected:
        assert (status, found["status"]) == (0, "missing")
        assert expected in found["summary"]
    else:
        assert (status, found["status"]) == (1, "failed")


DONE = {"status": "done", "summary": "8 of 8 right"}


@pytest.mark.parametrize(
    ("tool", "text", "smoke_record", "reports", "verdict"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", DONE, 0, None),
        (
            "memcheck",
            "========= Invalid read\n========= ERROR SUMMARY: 3 errors\n",
            DONE,
            3,
            "failed",
        ),
        (
            *(
                "racecheck",
                "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            ),
            *(DONE, 0, None),
        ),
        (
            *(
                "racecheck",
                "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
            ),
            *(DONE, 1, "failed"),
        ),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", {"status": "failed"}, 0, "failed"),
        ("memcheck", "========= Error: Device not supported\n", {}, None, "missing"),
        ("memcheck", "", {}, None, "failed"),
    ],
)
def test_what_compute_sanitizer_says(tool, text, smoke_record, reports, verdict):
    row = sanitizer.verdict(tool, text, smoke_record)
    assert row["reports"] == reports
    assert [name for name in ("failed", "missing") if name in row] == ([verdict] if verdict else [])


# --- The tables -----------------------------------------------------------------------------------


def test_tables_of_a_recorded_report():
    recorded = json.loads(Path(__file__).with_name("gpu_report_sample.json").read_text())
    lines = tables.markdown(recorded).splitlines()
    for line in (
        "gpu: Some GPU, 1.0; commit: abc",
        "| 1. build | done | 61 of 150 | sm_90, nvcc 13.0, 61 s, 0 warnings of ptxas |",
        "| 5. counters | missing: ncu (Nsight Compute) | 3 of 35 |  |",
        "| 6. sanitizer | stopped | 45 of 45 | stopped after 1 results |",
        "| softmax_divergence jsd | 1 of 2 | cluster 2, warp |",
        r"| softmax_divergence jsd | bfloat16 | 32,000 | eager: nan at (0,) \| (1,) |",
        "| tests/a.py::test_x[cuda] | assert False |",
        "| ms, of the roof | bfloat16 8,192 x 151,936 | float32 1 x 151,936 |",
        "| roof: 2 reads, 1 write (16-byte packs) | 1.75, 4,271 GB/s |  |",
        "| softmax_divergence forward_kl | 2.1, 83% | 0.0123, 41% |",
        "| softmax_divergence forward_kl | 31 | 88.2 |",
        "| acm, 4096 x 768 x 768 x 4, f = 0.5 | bfloat16 | 0.0512 | 123 | 2.5 |",
        "| kl_div | OutOfMemoryError: no |",
        "| memcheck | 0 | nothing found | 8 of 8 right |",
        "| forward_kl, 4,096 x 151,936 bfloat16, loss + gradient | fastkd | 1.04 | 1.19 | 1 x |"
        " 1,187 |  |",
        "|  | triton | 2.3 |  | 2.21 x | 1,187 |  |",
        "|  | liger |  |  |  |  | ImportError: no |",
    ):
        assert line in lines, line
    # Every table is one: as many cells in each line as in its head.
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            cells = [x.replace("\\|", "").count("|") for x in (above, line)]
            assert cells[0] == cells[1], line


def test_digits():
    values = (0.01234, 1.75, 123.4, 4271.3, None)
    assert [tables.digits(x) for x in values] == ["0.0123", "1.75", "123", "4,271", ""]
