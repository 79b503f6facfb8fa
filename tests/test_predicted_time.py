"""The arithmetic of benchmarks.predicted_time against examples computed by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import emulator
import pytest

from benchmarks.predicted_launches import launches
from benchmarks.predicted_loops import Count, Recorded
from benchmarks.predicted_ops import DTYPES, MIXED, OPS, Op, Over, Part
from benchmarks.predicted_time import GPUS, VOCAB, count_of_pass, load, predict
from benchmarks.time_model import Gpu, Launch, PassCount, Serial, Stage, times_of, times_of_stage

ROOT = Path(__file__).parent.parent
# 10 multiprocessors at 1 GHz: 1.28e12 thread instructions, 1.6e11 MUFU operations, 0.9e12 bytes of
# a copy in a second.
TOY = Gpu("toy", 90, 1e12, 1e9, 10, 2048, 228 << 10)
LAUNCH = Launch(threads=256, cluster=4, shared=100 << 10, resident=True)


def test_causes():
    assert TOY.roof == pytest.approx(0.9e12)
    assert TOY.issue(1.28e9) == pytest.approx(1e-3)
    assert TOY.mufu(1.6e8) == pytest.approx(1e-3)
    # 40 KiB under way on each of 10 multiprocessors, back after 800 ns: 512 GB a second.
    assert TOY.loads(5.12e8, 40 << 10) == pytest.approx(1e-3)
    assert TOY.loads(0, 0) == 0


def test_causes_of_a_real_device():
    """Forward KL in bfloat16 on an H200: 6 bytes and 89 instructions a pair."""
    pairs, gpu = 8192 * 151_936, GPUS["H200"]
    assert 6 * pairs / gpu.roof == pytest.approx(1.73e-3, rel=0.01)
    assert gpu.issue(89 * pairs) == pytest.approx(3.31e-3, rel=0.01)
    # 2 blocks of 192 threads with one load each, of the 40 KiB that the memory's speed needs.
    assert gpu.loads(4 * pairs, 2 * 192 * 16) == pytest.approx(4.91e-3, rel=0.01)


@pytest.mark.parametrize(
    ("threads", "shared", "registers", "blocks"),
    [
        (256, 100 << 10, 32, 2),  # 228 KiB / 101 KiB
        (256, 227 << 10, 32, 1),
        (256, 1 << 10, 32, 8),  # 2,048 threads
        (256, 1 << 10, 64, 4),  # 8 warps of 2,048 registers: a quarter of 65,536
        (256, 1 << 10, 65, 3),  # 65 x 32 = 2,080, given out as 2,304
        (32, 0, 16, 32),  # at most 32 blocks
        (256, 1 << 20, 32, 1),  # at least one
    ],
)
def test_blocks_on_a_multiprocessor(threads, shared, registers, blocks):
    launch = Launch(threads, 4, shared, True)
    assert launch.blocks(TOY, registers) == blocks
    assert launch.teams(TOY, registers) == 10 * blocks / 4


def test_a_stage():
    first = PassCount(read=0.9e9, written=0, instructions=2.56e9, mufu=1.6e8, under_way=40 << 10)
    second = PassCount(read=0, written=1.8e9, instructions=1.28e9, mufu=0, under_way=40 << 10)
    found = times_of_stage(TOY, Stage((first, second), serial=4e-3, blocks=2))
    loads = 0.9e9 / 5.12e8 * 1e-3
    assert found[:5] == pytest.approx((3e-3, 3e-3, 1e-3, loads, 4e-3))
    assert found.at_least == pytest.approx(4e-3)
    assert found.binds == "serial"
    assert found.total == pytest.approx(2e-3 + 2e-3 + 4e-3)  # issue, bytes, serial
    assert found.predicted == pytest.approx(4e-3 + (8e-3 - 4e-3) / 2)
    alone = times_of_stage(TOY, Stage((first, second), serial=4e-3, blocks=1))
    assert alone.predicted == pytest.approx(8e-3)
    both = times_of(TOY, [Stage((first, second), 4e-3, 2), Stage((first, second), 4e-3, 1)])
    assert both.predicted == pytest.approx(6e-3 + 8e-3)
    assert both.bytes == pytest.approx(6e-3)


def test_serial_work():
    # 100 instructions and 50 of the merge, 4 cycles each, at 1 GHz; 2 barriers of 500 ns.
    assert Serial(100, 50, 2).seconds(TOY, LAUNCH) == pytest.approx((100 + 50) * 4e-9 + 1e-6)
    # Without a cluster there is nothing to merge and no barrier of a cluster.
    one = LAUNCH._replace(cluster=1)
    assert Serial(100, 50, 2).seconds(TOY, one) == pytest.approx(400e-9)


def test_a_pass_of_a_call():
    count = Count(20.0, {"fp": 12.0, "mufu": 2.0, "alu": 6.0}, in_flight=3, checked=0.0)

    def found_in(over, launch, dtype="bfloat16", copied=False):
        return count_of_pass(over, count, launch, 1000.0, DTYPES[dtype], 2, copied)

    # The rows are in shared memory: only the gradient moves.
    assert found_in(Over(2, 1), LAUNCH) == PassCount(0, 2000, 20_000, 2000, 16 * 3 * 256 * 2)
    again = LAUNCH._replace(resident=False)
    assert found_in(Over(2, 1), again).read == 4000
    assert found_in(Over(2, again=False), LAUNCH).read == 4000
    assert found_in(Over(1, rows=False), again).read == 0
    # 4 bytes of the student and 2 of the teacher; the gradient has 4.
    mixed = found_in(Over(2, 1), again, MIXED)
    assert (mixed.read, mixed.written) == (6000, 4000)
    # Bulk copies fill half of the shared memory while the other half is in use.
    assert found_in(Over(2), LAUNCH, copied=True).under_way == 100 << 10


def test_a_call():
    """Two passes over 10 rows of 1,280 pairs of float32, which 5 teams share."""
    count = Count(16.0, {"fp": 15.0, "mufu": 1.0}, in_flight=4, checked=0.5)
    part = Part("kernel", "rows", (Over(2, again=False), Over(2, 1)), Serial(leader=250))
    op = Op("op", 2, 1, (part,), lambda student, teacher: None)
    worse = replace(count, instructions=20.0)
    recorded = [Recorded([count, count], [count, worse], 32, 0, 0)]
    found = predict(op, "float32", TOY, 10, 1280, recorded, {"rows": LAUNCH, "sum": LAUNCH})
    assert (found.instructions, found.mufu, found.checked) == (32.0, 2.0, 1.0)
    assert found.moved == 12 * 12_800
    assert found.floor == pytest.approx(12 * 12_800 / 0.9e12)
    assert found.under_way == 16 * 4 * 256 * 2
    assert found.times.issue == pytest.approx(32 * 12_800 / 1.28e12)
    assert found.times.serial == pytest.approx(10 / 5 * 1e-6)
    assert found.of_roof == pytest.approx(found.floor / found.times.predicted)
    again = LAUNCH._replace(resident=False)
    reread = predict(op, "float32", TOY, 10, 1280, recorded, {"rows": again})
    assert reread.instructions == 36.0
    assert reread.moved == 20 * 12_800


def test_every_op_is_recorded():
    """A new divergence may wait for the next `python -m benchmarks.predicted_time --record`."""
    counts, logged = load()
    assert {OPS[name].group for name in counts} == {op.group for op in OPS.values()}
    capabilities = {gpu.capability for gpu in GPUS.values()}
    assert set(logged) == {
        (op, dtype, c) for op in counts for dtype in OPS[op].dtypes for c in capabilities
    }


@pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")
def test_recorded_launches_are_those_of_the_policy():
    """Else: python -m benchmarks.predicted_time --record."""
    _, logged = load()
    calls = [(op, dtype) for op, dtype, capability in logged if capability == 90]
    for key, roles in launches(calls, VOCAB, [90]).items():
        for role, launch in logged[key].items():
            assert roles[role] == launch, (key, role)


def test_the_table_needs_no_compiler():
    command = [sys.executable, "-m", "benchmarks.predicted_time", "--json", "--op", "token_stats"]
    command += ["--gpu", "H200", "A100", "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(x["op"], x["gpu"], x["dtype"]) for x in found] == [
        ("token_stats pair", gpu, "float32") for gpu in ("H200", "A100")
    ]
    kept, again = found
    assert kept["launches"][0]["resident"]
    assert not again["launches"][0]["resident"]
    assert again["bytes"] == 2 * kept["bytes"]
    assert all(0 < x["of_roof"] <= 1 for x in found)
