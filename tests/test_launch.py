"""Launch configurations: the policy as a table, the log of launches, devices without clusters."""

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from cases import allowed_error, logits, top_k
from torch.autograd import grad

import fastkd
from fastkd import reference

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

# --- The policy -----------------------------------------------------------------------------------

# Which part of a reason's text stands for it here.
REASONS = {
    "elements": "element by element",
    "warp": "one warp per row",
    "quarter": "four blocks run on each",
    "half": "two blocks run on each",
    "whole": "one block runs on each",
    "exceeds 1": "exceed the shared memory of one block",
    "exceeds 8": "exceed the shared memory of 8 blocks",
    "exceeds 16": "exceed the shared memory of 16 blocks",
}
OLD, LARGE, SMALL = (75, 80, 86, 89), (90, 100), (120,)  # no clusters; 227 KiB and clusters; 99 KiB
EVERYWHERE = (*OLD, *LARGE, *SMALL)
REREAD_OLD = (192, 0, 1, False, emulator.UNDER_WAY, "exceeds 1")
# (capabilities, bytes per element, vocab, tensors): threads, rows per block with one warp each
# (0: a row has a block or cluster), blocks per row, resident, bytes of a row per block, reason.
TABLE = [
    ((EVERYWHERE, 2, 1024, 2), (128, 4, 1, True, 2064, "warp")),
    ((EVERYWHERE, 2, 2040, 2), (128, 4, 1, True, 4096, "warp")),  # 16 bytes for an odd beginning
    ((EVERYWHERE, 2, 2041, 2), (128, 0, 1, True, 4112, "quarter")),
    ((EVERYWHERE, 4, 1024, 2), (128, 0, 1, True, 4112, "quarter")),
    (((75,), 2, 4096, 2), (192, 0, 1, True, 8208, "half")),
    (((80, 86, 89, *LARGE, *SMALL), 2, 4096, 2), (128, 0, 1, True, 8208, "quarter")),
    (((75,), 4, 4096, 2), (384, 0, 1, True, 16_400, "whole")),
    (((80, *LARGE), 4, 4096, 2), (128, 0, 1, True, 16_400, "quarter")),
    (((86, 89, *SMALL), 4, 4096, 2), (192, 0, 1, True, 16_400, "half")),
    (((75, 86, 89), 2, 32_000, 2), REREAD_OLD),
    (((80,), 2, 32_000, 2), (384, 0, 1, True, 64_016, "whole")),
    ((LARGE, 2, 32_000, 2), (128, 0, 4, True, 16_016, "quarter")),
    # With a quarter of 99 KiB it would take 8 blocks, with less than five packs a thread.
    ((SMALL, 2, 32_000, 2), (192, 0, 4, True, 16_016, "half")),
    ((OLD, 4, 32_000, 2), REREAD_OLD),
    ((LARGE, 4, 32_000, 2), (128, 0, 8, True, 16_016, "quarter")),
    ((SMALL, 4, 32_000, 2), (192, 0, 8, True, 16_016, "half")),
    ((OLD, 2, 50_257, 2), REREAD_OLD),
    ((LARGE, 2, 50_257, 2), (128, 0, 4, True, 25_136, "quarter")),
    ((SMALL, 2, 50_257, 2), (384, 0, 2, True, 50_272, "whole")),
    ((LARGE, 4, 50_257, 2), (128, 0, 8, True, 25_136, "quarter")),
    ((OLD, 2, 128_256, 2), REREAD_OLD),
    ((LARGE, 2, 128_256, 2), (128, 0, 16, True, 16_048, "quarter")),
    ((SMALL, 2, 128_256, 2), (384, 0, 8, True, 32_080, "whole")),
    ((LARGE, 4, 128_256, 2), (192, 0, 16, True, 32_080, "half")),
    ((SMALL, 4, 128_256, 2), (192, 0, 1, False, emulator.UNDER_WAY, "exceeds 8")),
    ((OLD, 2, 151_936, 2), REREAD_OLD),
    ((LARGE, 2, 151_936, 2), (128, 0, 16, True, 19_008, "quarter")),
    ((SMALL, 2, 151_936, 2), (384, 0, 8, True, 38_000, "whole")),
    ((LARGE, 4, 151_936, 2), (192, 0, 16, True, 38_000, "half")),
    ((LARGE, 2, 262_144, 2), (192, 0, 16, True, 32_784, "half")),
    ((LARGE, 4, 262_144, 2), (384, 0, 16, True, 65_552, "whole")),
    ((SMALL, 2, 262_144, 2), (192, 0, 1, False, emulator.UNDER_WAY, "exceeds 8")),
    ((LARGE, 4, 500_000, 2), (192, 0, 1, False, emulator.UNDER_WAY, "exceeds 16")),
    # One tensor: topk_divergence, cross_entropy.
    (((80,), 2, 50_257, 1), (384, 0, 1, True, 100_544, "whole")),
    ((LARGE, 2, 50_257, 1), (128, 0, 2, True, 50_272, "quarter")),
    ((LARGE, 4, 262_144, 1), (192, 0, 16, True, 65_552, "half")),
    ((SMALL, 4, 151_936, 1), (384, 0, 8, True, 75_984, "whole")),
]


class _RowLaunch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("threads", "warp_rows", "cluster", "resident")),
        ("slice_bytes", ctypes.c_longlong),
        ("reason", ctypes.c_char_p),
    ]


def policy(capability, element, vocab, tensors=2, *, overhead=0, packed=True, threads=192):
    """(threads, warp_rows, cluster, resident, slice_bytes, reason), as row_launch returns them."""
    out, size = _RowLaunch(), ctypes.c_longlong
    emulator.library().simt_row_launch(
        *(capability, element, size(vocab), size(overhead), packed, tensors, threads),
        ctypes.byref(out),
    )
    (reason,) = [name for name, text in REASONS.items() if text in out.reason.decode()]
    numbers = (out.threads, out.warp_rows, out.cluster, bool(out.resident), out.slice_bytes)
    return (*numbers, reason)


@pytest.mark.parametrize(("case", "expected"), TABLE, ids=str)
def test_policy(case, expected):
    capabilities, *arguments = case
    for capability in capabilities:
        assert policy(capability, *arguments) == expected, capability


@pytest.mark.parametrize("capability", EVERYWHERE)
@pytest.mark.parametrize(
    ("vocab", "threads"), [(1023, 32), (1024, 128), (4096, 192), (32_000, 192)]
)
def test_rows_without_packs_are_read_again(capability, vocab, threads):
    expected = (threads, 0, 1, False, 0, "elements")
    assert policy(capability, 4, vocab, packed=False) == expected


def test_what_a_team_needs_besides_its_rows_counts():
    barriers = 4 * 8
    room = (227 + 1) * 1024 // 4 - 1024 - 2 * 19_008 - barriers
    fitting = (128, 0, 16, True, 19_008, "quarter")
    assert policy(90, 2, 151_936, overhead=room) == fitting
    larger = (192, 0, 8, True, 38_000, "half")  # with two blocks per multiprocessor 8 are enough
    assert policy(90, 2, 151_936, overhead=room + 1) == larger


# KiB per block, and the most blocks of a cluster, from the CUDA programming guide.
LIMITS = {75: (64, 1), 80: (163, 1), 86: (99, 1), 89: (99, 1), 90: (227, 16), 100: (227, 16)}
LIMITS[120] = (99, 8)


@pytest.mark.parametrize("capability", EVERYWHERE)
def test_every_launch_is_possible_and_holds_its_rows(capability):
    shared, most = LIMITS[capability]
    for element in (2, 4):
        for tensors in (1, 2):
            for vocab in (*range(1, 40), *np.unique(np.geomspace(40, 2e6, 300).astype(int))):
                found = policy(capability, element, int(vocab), tensors, overhead=2000)
                threads, warp_rows, cluster, resident, size, _ = found
                assert threads in (128, 192, 384), vocab
                assert cluster <= most, vocab
                if warp_rows:
                    assert (warp_rows, cluster, resident) == (threads // 32, 1, True), vocab
                    assert size <= 4096, vocab
                if not resident:
                    assert tensors * size + 2000 <= shared * 1024, vocab
                if resident:
                    assert size % 16 == 0, vocab
                    assert cluster * size >= vocab * element, vocab
                    if not warp_rows:
                        assert tensors * size + 2000 <= shared * 1024, vocab
                    # A block of a cluster has enough to do.
                    assert cluster == 1 or size >= 5 * 16 * threads, vocab


# --- The log --------------------------------------------------------------------------------------

ROWS = (
    "short",
    "dtypes differ",
    "offsets differ",
    "one pass",
    "short, one pass",
    "block per row",
    "warps' memory",
)
ROWS += ("no rows",)

HEAD, LINE = emulator.LAUNCH_HEAD, emulator.LAUNCH_LINE
REFUSED = re.compile(
    rf"fastkd refused{HEAD}: the device cannot run this cluster; used instead: (?P<instead>\S.*)"
)


def stderr_of(value, *groups):
    """What the calls print with FASTKD_LOG=value, None: unset."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTKD_LOG"}
    if value is not None:
        environment["FASTKD_LOG"] = value
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("launch_calls.py"), *groups],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def log():
    """By the call's name, its lines: matches of LINE or REFUSED."""
    found = {}
    for line in stderr_of("launch", "devices", "rows", "every_op").splitlines():
        if line.startswith("== "):
            lines = found[line[3:]] = []
            continue
        match = LINE.fullmatch(line) or REFUSED.fullmatch(line)
        assert match, line
        lines.append(match)
    return found


@pytest.mark.parametrize("capability", EVERYWHERE)
def test_a_line_has_the_launch(log, capability):
    rows, total = log[str(capability)]
    assert rows.expand(r"\g<op> \g<role> \g<rows>x\g<columns> \g<dtype>") == (
        "softmax_divergence rows 2x32000 bfloat16"
    )
    threads, _, cluster, resident, size, reason = policy(
        capability, 2, 32_000, overhead=2000, threads=256
    )
    assert [int(rows[k]) for k in ("sm", "threads", "cluster")] == [capability, threads, cluster]
    assert int(rows["blocks"]) == 2 * cluster
    assert rows["resident"] == ("yes" if resident else "no")
    assert 0 < int(rows["shared"]) - 2 * size < 8192
    assert REASONS[reason] in rows["reason"]
    assert (total["role"], total["blocks"], total["cluster"]) == ("sum of the losses", "1", "1")


@pytest.mark.parametrize(
    ("call", "threads", "blocks", "resident", "reason"),
    [
        ("short", 128, 2, "yes", "one warp per row, 4 rows per block"),
        ("dtypes differ", 128, 2, "yes", "the rows fit with a quarter"),
        ("offsets differ", 192, 2, "no", "rows are read element by element"),
        ("one pass", 192, 2, "no", "there is one pass"),
        ("short, one pass", 128, 2, "no", "4 rows per block; there is one pass"),
        ("block per row", 128, 2, "yes", "this op needs a whole block"),
        ("warps' memory", 128, 2, "yes", "4 rows per block would need too much shared memory"),
    ],
)
def test_reasons(log, call, threads, blocks, resident, reason):
    line = next(line for line in log[call] if line["role"] == "rows")
    assert (int(line["threads"]), int(line["blocks"])) == (threads, blocks)
    assert line["resident"] == resident
    assert reason in line["reason"]


def test_a_refused_cluster_is_said_with_what_runs_instead(log):
    refused, rows, _ = log["refused"]
    threads, _, cluster, *_ = policy(90, 2, 32_000, overhead=2000, threads=256)
    assert refused.re is REFUSED
    assert (int(refused["threads"]), int(refused["cluster"])) == (threads, cluster)
    assert refused["instead"] == (
        "one block per row, without a cluster; each pass reads the rows again"
    )
    assert (rows["cluster"], rows["blocks"], rows["resident"]) == ("1", "2", "no")
    assert "the device cannot run the cluster" in rows["reason"]

    sixteen, eight, rows, _ = log["refused twice"]
    assert [int(x["cluster"]) for x in (sixteen, eight, rows)] == [16, 8, 1]
    assert sixteen["instead"] == "a launch with fewer blocks per row"
    assert "without a cluster" in eight["instead"]
    sixteen, rows, _ = log["sixteen refused"]
    assert (int(sixteen["cluster"]), sixteen.re) == (16, REFUSED)
    assert (int(rows["cluster"]), rows["resident"]) == (8, "yes")

    for op in (
        *("topk_divergence", "clipped_divergence", "cross_entropy", "token_log_probs"),
        *("token_stats", "teacher_topk"),
    ):
        *_, refused, rows = (x for x in log[f"{op} refused"] if x["role"] == "rows")
        assert (refused.re, refused["op"], refused["role"]) == (REFUSED, op, "rows")
        assert int(refused["cluster"]) > 1
        assert (rows["op"], rows["role"], rows["cluster"]) == (op, "rows", "1")
        assert "the device cannot run the cluster" in rows["reason"]

    refused, slices, total = log["byte_log_probs refused"]
    assert refused.re is REFUSED
    assert int(refused["cluster"]) > 1
    assert "slices without a cluster" in refused["instead"]
    assert (slices["role"], slices["cluster"]) == ("slices", "1")
    assert total["role"] == "sum of slices"


def test_every_kernel_has_a_line(log):
    assert {(x["op"], x["role"]) for lines in log.values() for x in lines} == {
        *(("softmax_divergence", role) for role in ("rows", "denominator", "sum of the losses")),
        *(("topk_divergence", role) for role in ("rows", "denominator", "sum of the losses")),
        *(("clipped_divergence", role) for role in ("rows", "denominator", "sum of the losses")),
        ("clipped_divergence", "rows of small mass"),
        ("softmax_divergence", "losses"),
        *(("cross_entropy", role) for role in ("rows", "denominator", "sum of the losses")),
        *(("token_log_probs", role) for role in ("rows", "gradient")),
        ("token_stats", "rows"),
        ("teacher_topk", "rows"),
        *(("chunk_log_likelihood", role) for role in ("rows", "texts", "boundary set", "gradient")),
        *(("byte_log_probs", role) for role in ("rows", "slices", "sum of slices", "gradient")),
        *(("kl_div", role) for role in ("terms", "sum")),
        ("_scale_rows_", "rows"),
        *(("acm.hard", role) for role in ("route", "learners", "outputs", "weights")),
        ("acm.hard", "sum of parts"),
    }
    assert log["no rows"] == []  # nothing is launched


def test_nothing_is_printed_without_the_variable():
    assert stderr_of(None, "rows").splitlines() == [f"== {name}" for name in ROWS]
    assert stderr_of("", "rows").splitlines() == [f"== {name}" for name in ROWS]


def test_an_unknown_value_gives_one_warning():
    lines = [x for x in stderr_of("lunch", "rows").splitlines() if not x.startswith("== ")]
    assert lines == [
        "fastkd warning: FASTKD_LOG must be launch or unset, got lunch; nothing is logged"
    ]


# --- What the driver is asked ---------------------------------------------------------------------


def test_the_driver_is_asked_once_on_each_device():
    """Attributes set and occupancy asked for, by a process that has launched nothing before."""
    lines = stderr_of(None, "asked").splitlines()
    assert lines == ["1 1", "0 0", "0 1", "1 1", "0 0", "0 0"]


# --- Devices that refuse clusters -----------------------------------------------------------------

LONG = 60_000


@dataclass
class Call:
    """An op with its definition, on the same tensors, of which `gradients` are differentiated."""

    op: str
    tensors: tuple
    gradients: int = 0
    options: tuple = ()

    def run(self, module, tensors):
        found = getattr(module, self.op)(*tensors, **dict(self.options))
        return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def _calls():
    student, teacher = logits((3, LONG)), logits((3, LONG))
    yield Call("softmax_divergence", (student, teacher), 2, (("divergence", "jsd"),))
    yield Call("softmax_divergence", (student, teacher), 2)
    yield Call("topk_divergence", (student, *top_k((3, LONG), 20)), 1)
    yield Call("clipped_divergence", (student, teacher, 1e-6, 0.5), 2)
    yield Call("token_stats", (student, teacher))
    yield Call("teacher_topk", (teacher, 20))
    tokens = [bytes([i % 256, i // 256]) for i in range(LONG)]
    yield Call("byte_log_probs", (student, fastkd.ByteVocab(tokens)))


def _double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("clusters", [True, False])
def test_results_are_right_where_clusters_are_refused(monkeypatch, number, clusters):
    """A launch of a cluster would be an error there (tests/simt)."""
    call = list(_calls())[number]
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)
    emulator.configure(90, clusters=clusters)
    inputs = list(call.tensors)
    exact_inputs = [_double(x) for x in inputs]
    for place in range(call.gradients):
        inputs[place] = inputs[place].requires_grad_()
        exact_inputs[place] = exact_inputs[place].requires_grad_()
    out = []
    found = emulator.traffic_of(lambda: out.extend(call.run(fastkd, inputs)))
    assert (found.largest_cluster > 1) == clusters
    exact = call.run(reference, exact_inputs)
    for mine, right in zip(out, exact, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), rtol=1e-5, atol=1e-6)
    if call.gradients:
        mine = grad(out[0].sum(), inputs[: call.gradients])
        right = grad(exact[0].sum(), exact_inputs[: call.gradients])
        divergence = dict(call.options).get("divergence", "")
        for x, y in zip(mine, right, strict=True):
            assert (x.double() - y).norm() <= allowed_error(y, x.dtype, divergence)
