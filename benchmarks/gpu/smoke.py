"""Every op in every dtype and launch against float64: poisoned memory, a side stream, a graph.

The launch depends on the vocabulary (csrc/cuda/common/policy.cuh): the vocabularies lead to one
warp a row, one block, clusters of 2, 4, 8 and 16 blocks, rows that are read again, and rows off
16-byte lines. The launch log says which of these came, and the record keeps it.

    python -m benchmarks.gpu.smoke --output FOLDER --backend simt --vocab 40 5001 --rows 2

runs the same on the emulated kernels (tests/simt), without streams and graphs.
"""

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.problems import PROBLEMS, Problem
from benchmarks.gpu.stage import Missing, Record, age, of_tests, options_of, require_kernels, run
from benchmarks.shapes import DTYPES

#: On sm_90: one warp a row for 1,000, one block for 5,000, clusters up to 262,144 (with 16 bits,
#: 600,000); rows beyond are read again. Rows of 50,257 begin off 16-byte lines.
VOCABULARIES = (32_000, 1000, 5000, 151_936, 262_144, 600_000, 50_257, 1_200_000)
ROWS = 5
MIXED = "mixed"
KINDS = ("float32", "bfloat16", "float16", MIXED)
MODES = ("eager", "stream", "graph")
#: Relative errors that may be left: of values, and of acm's results and gradients, which are sums
#: of products.
VALUE, SMALL_VALUE = 1e-5, 1e-6
PRODUCTS = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
#: A graph is replayed so often; its results are overwritten each time before.
REPLAYS = 2
#: Roles of launches that read logits.
ROLES = ("rows", "slices", "gradient", "learners", "outputs", "terms")
#: What the vocabularies lead to on sm_90.
LAUNCHES = ("warp", *(f"cluster {n}" for n in (1, 2, 4, 8, 16)), "re-read", "elements")

Values = tuple[list[Tensor], list[Tensor]]
"""Outputs, and gradients of the leaves."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that tensors are made of with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)
            torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def stderr_lines(found: list[str]) -> Iterator[None]:
    """Add to `found` what the kernels' host code prints on stderr meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            found += file.read().decode(errors="replace").splitlines()


@contextmanager
def simt() -> Iterator[torch.device]:
    """Run the ops' CUDA kernels under the emulator."""
    from fastkd.acm import _kernels

    emulator = of_tests("emulator")
    if not emulator.is_built():
        raise Missing(f"the emulated kernels ({emulator.PATH}: make build/simt/.built)")
    ops, dtypes = emulator.ops(), _kernels.DTYPES["cpu"]
    emulator.configure(90)
    plain, torch.ops.fastkd = torch.ops.fastkd, ops
    _kernels.DTYPES["cpu"] = (torch.float32, torch.bfloat16, torch.float16)
    try:
        yield torch.device("cpu")
    finally:
        torch.ops.fastkd = plain
        _kernels.DTYPES["cpu"] = dtypes


@contextmanager
def cuda() -> Iterator[torch.device]:
    """Run them on the GPU."""
    require_kernels()
    yield torch.device("cuda", torch.cuda.current_device())


BACKENDS = {"cuda": cuda, "simt": simt}


def tensors_of(
    problem: Problem, kind: str, rows: int, vocab: int, device: torch.device
) -> list[Tensor]:
    """The problem's tensors, those of the first dtype and, if `kind` is mixed, the second's."""
    if kind != MIXED:
        return problem.make(rows, vocab, DTYPES[kind], device)
    first, *others = problem.make(rows, vocab, torch.float32, device)
    return [first, *(x.bfloat16() if x.is_floating_point() else x for x in others)]


def evaluate(problem: Problem, module: Any, tensors: Sequence[Tensor]) -> Values:
    """Outputs, and gradients from a direction that differs from entry to entry."""
    inputs = list(tensors)
    leaves = [x.detach().requires_grad_() for x in inputs[: problem.leaves]]
    inputs[: problem.leaves] = leaves
    with torch.set_grad_enabled(problem.leaves > 0):
        outputs = problem.read(inputs, problem.call(module, inputs))
    if not leaves:
        return outputs, []
    directions = [
        torch.linspace(0.5, 1.5, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
        for x in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, directions)
    return [x.detach() for x in outputs], list(gradients)


def eager(make: Callable[[], Values], device: torch.device) -> Values:
    """One call on the current stream."""
    import fastkd

    fastkd.release_memory()  # a gradient's memory that is kept would not be poisoned
    with poisoned():
        return make()


def stream(make: Callable[[], Values], device: torch.device) -> Values:
    """One call on a side stream, behind work that the default stream does not wait for."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000)
        found = eager(make, device)
    torch.cuda.current_stream(device).wait_stream(side)
    return found


def graph(make: Callable[[], Values], device: torch.device) -> Values:
    """Captured once and replayed: memory is poisoned in the graph itself."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), poisoned():
        make()
        # torch.cuda.graph would collect garbage and empty the allocator first, which takes longer
        # than all the rest.
        captured.capture_begin()
        try:
            found = make()
        except BaseException:
            with suppress(RuntimeError):
                captured.capture_end()
            raise
        captured.capture_end()
    torch.cuda.current_stream(device).wait_stream(side)
    for _ in range(REPLAYS):
        for value in (*found[0], *found[1]):
            value.fill_(math.nan)
        captured.replay()
    kept = [x.clone() for x in found[0]], [x.clone() for x in found[1]]
    torch.cuda.synchronize(device)
    return kept


WAYS = {"eager": eager, "stream": stream, "graph": graph}


def compare(problem: Problem, found: Values, exact: Values) -> str | None:
    """Return what is wrong, or None."""
    allowed_error = of_tests("cases").allowed_error
    for number, (value, right) in enumerate(zip(found[0], exact[0], strict=True)):
        wrong = _compare_value(problem, value, right)
        if wrong:
            return f"output {number}: {wrong}"
    for number, (value, right) in enumerate(zip(found[1], exact[1], strict=True)):
        error = (value.double() - right).norm().item()
        allowed = allowed_error(right, value.dtype, problem.divergence)
        if not problem.rows:
            allowed = PRODUCTS[value.dtype] * right.norm().item()
        if not error <= allowed:
            return f"gradient {number}: off by {error:.2e}, allowed {allowed:.2e}"
    return None


def _compare_value(problem: Problem, value: Tensor, right: Tensor) -> str | None:
    error = (value.double() - right).abs()
    if not problem.rows:
        relative = (error.norm() / right.norm()).item()
        return None if relative <= PRODUCTS[value.dtype] else f"off by {relative:.2e} of its norm"
    relative = max(VALUE, torch.finfo(value.dtype).eps)  # a value of 16 bits is rounded twice
    bound = relative * right.abs() + SMALL_VALUE
    bad = ~((error <= bound) | (value.double() == right))
    if not bad.any():
        return None
    at = tuple(bad.nonzero()[0].tolist())
    return f"{int(bad.sum())} of {bad.numel()}, {value[at].item()!r} at {at}, {right[at].item()!r}"


def launch_kinds(lines: Sequence[str]) -> list[str]:
    """What the log says of the launches over rows: role, cluster, whether rows stay."""
    pattern = of_tests("emulator").LAUNCH_LINE
    kinds = []
    for line in lines:
        match = pattern.fullmatch(line)
        if match is None:
            if line.strip():
                print(line, file=sys.stderr)
            continue
        if match["role"] not in ROLES or match["op"] == "_scale_rows_":
            continue
        how = f"cluster {match['cluster']}"
        if "element by element" in match["reason"]:
            how = "elements"
        elif "one warp per row" in match["reason"]:
            how = "warp"
        elif match["resident"] == "no" and "each pass reads" in match["reason"]:
            how = "re-read"
        kinds.append(f"{match['role']}: {how}")
    return list(dict.fromkeys(kinds))


def check(
    problem: Problem,
    kind: str,
    vocab: int,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Check one problem in every mode; the result says the launches and what is wrong."""
    import fastkd

    row: dict[str, Any] = {"problem": problem.name, "dtype": kind, "vocab": vocab}
    lines: list[str] = []
    try:
        tensors = tensors_of(problem, kind, options.rows, vocab, device)
        doubles = [x.double() if x.is_floating_point() else x for x in tensors]
        exact = evaluate(problem, fastkd.reference, doubles)
        for mode in options.modes:
            print(f"begin: {problem.name}, {kind}, {vocab:,}, {mode}", flush=True)
            with stderr_lines(lines):
                found = WAYS[mode](lambda: evaluate(problem, fastkd, tensors), device)
            wrong = compare(problem, found, exact)
            if wrong:
                row.setdefault("wrong", f"{mode}: {wrong}")
    except Exception as error:
        row["wrong"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    row["launches"] = launch_kinds(lines)
    return row


def answers(device: torch.device) -> bool:
    """Whether the device still computes."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def require_poison(device: torch.device) -> None:
    """Refuse to say anything where unwritten memory could pass for a result."""
    like = torch.zeros(1000, device=device)
    with poisoned():
        probes = [torch.empty_like(like), torch.ops.fastkd._gradient_like(like)]
    if not all(probe.isnan().all() for probe in probes):
        raise RuntimeError("memory is not poisoned: torch does not fill what torch.empty returns")


def smoke(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Check every problem; a device that no longer answers ends it."""
    os.environ["FASTKD_LOG"] = "launch"  # read at the first launch
    names = options.problems or list(PROBLEMS)
    with BACKENDS[options.backend]() as device:
        require_poison(device)
        if device.type == "cuda":
            record.facts["gpu"] = torch.cuda.get_device_name(device)
        record.facts |= {"vocabularies": list(options.vocab), "modes": list(options.modes)}
        cases = list(product(options.vocab, names, options.dtypes))
        for number, (vocab, name, kind) in enumerate(cases):
            if age() > options.limit:
                record.facts["not_reached"] = len(cases) - number
                break
            problem = PROBLEMS[name]
            if kind == MIXED and not problem.mixes:
                continue
            if vocab > problem.most_vocab or (not problem.rows and vocab != options.vocab[0]):
                continue
            row = check(problem, kind, vocab, options, device)
            record.add(row)
            if "wrong" in row and not answers(device):
                raise RuntimeError(f"the device failed in {name}, {kind}, {vocab}: {row['wrong']}")
    wrong = [row for row in record.rows if "wrong" in row]
    seen = sorted({x.partition(": ")[2] for row in record.rows for x in row["launches"]})
    summary = f"{len(record.rows) - len(wrong)} of {len(record.rows)} right"
    if unseen := [kind for kind in LAUNCHES if kind not in seen]:
        summary += f"; no launch was: {', '.join(unseen)}"
    if "not_reached" in record.facts:
        summary += f"; {record.facts['not_reached']} were not reached in time"
    record.facts |= {"launches": seen, "unseen": unseen}
    return bool(record.rows) and not wrong, summary


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="cuda")
    add("--vocab", type=int, nargs="+", default=VOCABULARIES)
    add("--rows", type=int, default=ROWS)
    add("--dtypes", nargs="+", choices=KINDS, default=KINDS)
    add("--modes", nargs="+", choices=MODES, help="default: all that the backend has")
    add("--problems", nargs="+", choices=PROBLEMS, metavar="PROBLEM")
    options = parser.parse_args(arguments)
    options.modes = options.modes or (MODES if options.backend == "cuda" else MODES[:1])
    if options.backend == "simt" and set(options.modes) - {"eager"}:
        parser.error("--backend simt has neither streams nor graphs: --modes eager")
    return run("smoke", smoke, options)


if __name__ == "__main__":
    sys.exit(main())
