"""The report's stages that compute, on the emulated kernels and on the CPU: what they find."""

import argparse
import json
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
import registry
import torch

import fastkd
from benchmarks import baselines, cupy_roofs, measure
from benchmarks.gpu import peers, smoke, times
from benchmarks.gpu.problems import PROBLEMS, Problem, one
from benchmarks.harness import Case, Contestant, run_case
from benchmarks.shapes import Shape, Traffic, correlated_logits

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OPTIONS = argparse.Namespace(rows=3, modes=("eager",))


def record_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# --- The smoke test -------------------------------------------------------------------------------


def test_every_op_has_a_problem():
    ops = {entry.name for entry in registry.EVERY} | {"acm"}
    assert {problem.op for problem in PROBLEMS.values()} == ops


@pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")
@pytest.mark.parametrize(
    ("arguments", "count", "launches"),
    [
        ("--vocab 1001", 115, {"warp", "cluster 1", "elements"}),
        (
            "--vocab 33000 600000 --rows 1 --dtypes bfloat16 float32",
            8,
            {"cluster 4", "cluster 8", "cluster 16", "re-read"},
        ),
    ],
)
def test_smoke_on_the_emulated_kernels(arguments, count, launches, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.smoke", "--output", tmp_path]
    if count < len(PROBLEMS):
        command += ["--problems", "softmax_divergence forward_kl", "token_stats pair"]
    # A process of its own, since FASTKD_LOG is read once.
    done = subprocess.run(
        [*command, "--backend", "simt", "--rows", "2", *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = record_of(tmp_path, "smoke")
    assert found["summary"].startswith(f"{count} of {count} right")
    assert set(found["facts"]["launches"]) == launches
    assert set(found["facts"]["unseen"]) == set(smoke.LAUNCHES) - launches
    assert all(row["launches"] for row in found["rows"])


def faulty(change) -> Problem:
    """token_stats' log-sum-exp and a loss, whose results are changed on fastkd's side."""

    def call(module, tensors):
        if module is not fastkd:
            return [tensors[0].logsumexp(-1)]
        return [change(tensors[0].logsumexp(-1), tensors[0])]

    return Problem("faulty", "token_stats", one, call, 1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[-1] *= 1.001
        return gradient


def without_the_last(value, logits):
    out = torch.empty_like(value)
    out[:-1] = value[:-1]
    return out


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda value, logits: value, None),
        (lambda value, logits: value * (1 + 1e-4), "output 0: 3 of 3"),
        (without_the_last, "output 0: 1 of 3, nan at (2,)"),
        (lambda value, logits: WrongGradient.apply(value), "gradient 0: off by"),
        (lambda value, logits: logits.missing, "AttributeError"),
    ],
)
def test_the_smoke_test_reports(change, wrong):
    for kind in ("float32", "bfloat16"):
        if kind == "bfloat16" and wrong != "AttributeError":
            continue  # torch's own rounding
        row = smoke.check(faulty(change), kind, 2000, OPTIONS, CPU)
        assert (wrong is None) == ("wrong" not in row), row
        assert wrong is None or wrong in row["wrong"]


def test_memory_is_poisoned_only_meanwhile():
    smoke.require_poison(CPU)
    with smoke.poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_printed_below_python_is_kept(capfd):
    lines: list[str] = []
    with smoke.stderr_lines(lines):
        subprocess.run(["sh", "-c", "echo here >&2"], check=True)
    assert lines == ["here"]
    assert smoke.launch_kinds(lines) == []
    assert capfd.readouterr().err == "here\n"  # what is no launch is printed again


class FakeStream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


def fake_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)


@pytest.mark.parametrize("works", [True, False])
def test_a_graph_s_results_are_those_of_its_replay(works, monkeypatch):
    out, made = torch.zeros(3), []

    def make():
        made.append(torch.empty(2))
        return [out.fill_(7.0)], []

    class Graph:
        def capture_begin(self):
            pass

        def capture_end(self):
            pass

        def replay(self):
            if works:
                make()

    fake_streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    ((found,), _) = smoke.graph(make, CPU)
    assert (found == 7).all() if works else found.isnan().all()
    assert made[1].isnan().all()  # the captured memory is poisoned


def test_a_capture_that_fails_is_ended(monkeypatch):
    ended = []

    class Graph:
        def capture_begin(self):
            pass

        def capture_end(self):
            ended.append(True)
            raise RuntimeError("the capture is invalid")

    calls = []

    def make():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("it waits for the device")
        return [torch.zeros(1)], []

    fake_streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(ValueError, match="it waits"):
        smoke.graph(make, CPU)
    assert ended == [True]


def test_a_stream_of_its_own(monkeypatch):
    fake_streams(monkeypatch)
    assert smoke.stream(lambda: ([torch.empty(2)], []), CPU)[0][0].isnan().all()


# --- Times and peers ------------------------------------------------------------------------------


def test_times(tmp_path):
    names = ("softmax_divergence jsd", "topk_divergence k=64", "token_stats one", "alm_loss")
    sizes = ["--rows", "4", "--vocab", "1000", "--dtypes", "float32", "--budget", "0.01"]
    arguments = ["--output", str(tmp_path), "--device", "cpu", *sizes]
    assert times.main([*arguments, "--problems", *names]) == 0
    rows = record_of(tmp_path, "times")["rows"]
    timed = {row["problem"]: row for row in rows if "of_roof" in row}
    assert set(timed) == set(names)
    for name, row in timed.items():
        problem = PROBLEMS[name]
        moved = (problem.reads + problem.writes) * 4 * 1000 * 4
        assert row["gb_s"] * row["ms"] * 1e6 == pytest.approx(moved)
        roof = next(
            x
            for x in rows
            if x["problem"].startswith(f"roof: {times.roof_name(times.traffic_of(problem))} (")
        )
        assert roof["ms"] / row["ms"] < 1
    host = [(row["problem"], row["gradient"]) for row in rows if "host_us" in row]
    assert len(host) == len(set(host)) == 7  # token_stats has no gradient


def test_a_problem_that_fails_is_named_and_the_others_are_timed(tmp_path, monkeypatch):
    broken = replace(PROBLEMS["token_stats pair"], call=lambda module, tensors: tensors.missing)
    monkeypatch.setitem(PROBLEMS, broken.name, broken)
    names = (broken.name, "token_stats one")
    rows = []
    for problem in (PROBLEMS[name] for name in names):
        rows += times.time_group([problem], Shape(2, 100, torch.float32), 0.01, CPU)
    assert [row["problem"] for row in rows if "failed" in row] == [broken.name]
    assert [row["problem"] for row in rows if "of_roof" in row] == ["token_stats one"]


def test_a_step_has_the_gradient_of_the_student_alone():
    problem, seen = PROBLEMS["softmax_divergence forward_kl"], []

    def call(module, tensors):
        seen.append([x.requires_grad for x in tensors])
        return problem.call(module, tensors)

    tensors = problem.make(2, 50, torch.float32, CPU)
    for gradient in (True, False):
        times.step_of(replace(problem, call=call), tensors, gradient=gradient)()
    assert seen == [[True, False], [False, False]]


def test_layers_beside_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "LAYERS", ((8, 16, 16),))
    rows = []
    record = types.SimpleNamespace(add=rows.append)
    times.time_layers(record, 0.01, CPU)
    assert len(rows) == 8  # two dtypes, two shares, acm and the dense pair
    assert [row["over_share_of_dense"] for row in rows if "dense" in row["problem"]] == [1.0] * 4


def test_peers(tmp_path):
    sizes = ["--rows", "4", "--vocab", "300", "--budget", "0.01", "--cases", "forward_kl"]
    arguments = ["--output", str(tmp_path), "--device", "cpu", *sizes]
    assert peers.main([*arguments, "--contestants", "fastkd", "eager"]) == 0
    found = record_of(tmp_path, "peers")
    assert found["summary"].startswith("fastkd is the fastest in ")
    assert [x["dtype"] for x in found["rows"]] == ["bfloat16", "float32"]
    for case in found["rows"]:
        assert [x["name"] for x in case["contestants"]] == ["fastkd", "eager"]
        assert not any(x["wrong"] or x["failed"] for x in case["contestants"])


# --- Contestants and roofs of a GPU alone ---------------------------------------------------------


def names(contestants):
    return {contestant.name: contestant for contestant in contestants}


def test_contestants_of_a_gpu_alone(monkeypatch):
    def kernel(*arguments):
        raise AssertionError("it is not run on the CPU")

    modules = {"benchmarks.triton_kl": {"forward_kl": kernel}}
    apply = types.SimpleNamespace(apply=kernel)
    for module, name in (("jsd", "LigerJSDFunction"), ("kl_div", "LigerKLDivLossFunction")):
        modules[f"liger_kernel.ops.{module}"] = {name: apply}
    for name in ("liger_kernel", "liger_kernel.ops"):
        modules[name] = {}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        baselines._liger_kernel.cache_clear()
        found = names(baselines.softmax_divergence_contestants("forward_kl"))
        assert ("triton" in found) == ("liger, unfused" in found) == cuda
        assert ("liger" in names(baselines.kl_div_contestants())) == cuda
        assert not [x for x in found.values() if x.cuda_only != (x.name in CUDA_ONLY)]
    assert "triton" not in names(baselines.softmax_divergence_contestants("jsd"))
    baselines._liger_kernel.cache_clear()


CUDA_ONLY = ("triton", "liger, unfused")


def test_a_contestant_of_a_gpu_alone_is_left_out_on_the_cpu():
    def mean(student, teacher):
        return student.sum(-1).mean()

    def exact(student, teacher):
        return student.sum(-1)

    both = [Contestant("fastkd", mean), Contestant("kernel", exact, cuda_only=True)]
    case = Case("sum", Shape(2, 50, torch.float32), correlated_logits, exact, both)
    found = run_case(case, CPU, 0.01)
    assert [x.name for x in found.measurements] == ["fastkd"]
    assert found.find().failed is None


def test_the_device_waits_while_the_host_launches(monkeypatch):
    """For twice as long as the host last took, at least 1 ms and at most 5."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 5.0  # of ten million cycles: 2 GHz

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    properties = types.SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    take = measure._cuda_sampler(CPU)
    del slept[:]

    def quick():
        pass

    def middle():
        time.sleep(0.0015)

    def slow():
        time.sleep(0.02)

    for step in (quick, middle, slow):
        for _ in range(2):
            assert take(step, 1) == pytest.approx(5e-3)
    seconds = [cycles / 2e9 for cycles in slept]
    assert seconds[:3] == [1e-3, 1e-3, 1e-3]
    assert 3e-3 <= seconds[3] <= 5e-3
    assert seconds[4:] == [1e-3, 5e-3]


def test_roofs_of_a_gpu_name_a_missing_cupy(monkeypatch, capsys):
    def missing(*arguments):
        raise ImportError("no cupy")

    a = torch.ones(8)
    monkeypatch.setattr(cupy_roofs, "step", missing)
    assert measure._cupy_roof(a, a, Traffic(1, 0)) == {}
    assert "no cupy" in capsys.readouterr().out
    monkeypatch.setattr(cupy_roofs, "step", lambda *arguments: "the step")
    assert measure._cupy_roof(a, a, Traffic(1, 0)) == {"16-byte packs": "the step"}
    assert set(measure.roofs(a, a, Traffic(1, 0))) == {"norm", "sum"}
