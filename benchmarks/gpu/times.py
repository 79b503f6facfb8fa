"""Times on the GPU: every op beside its roof, acm beside cuBLAS, and what a call costs the host.

An op's roof is the fastest plain kernel that moves the bytes which the op cannot avoid: it is
measured in the same rounds (benchmarks/measure.py). A step is the loss, and the student's gradient
where there is one.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.problems import PROBLEMS, Problem
from benchmarks.gpu.stage import Record, options_of, require_kernels, run
from benchmarks.measure import Step, Timing, available_memory, roofs, time_interleaved
from benchmarks.shapes import DTYPES, QWEN, Shape, Traffic

ROWS = (8192, 256, 1)
KINDS = ("bfloat16", "float32")
#: So many tensors of the logits' size may be alive at once: the problem's, a gradient, the roofs'.
TENSORS = 16
#: acm's rows, width, learners' hidden units, and shares of learners that run.
LAYERS = ((4096, 768, 768), (4096, 4096, 4096))
SHARES = (0.5, 1.0)
CALLS, SMALL_VOCAB = 100, 1000


def step_of(problem: Problem, tensors: Sequence[Tensor], *, gradient: bool = True) -> Step:
    """One call, with the first tensor's gradient from an incoming one of 1."""
    import fastkd

    inputs = [x.detach() for x in tensors]
    if not (gradient and problem.leaves):

        def forward() -> None:
            with torch.no_grad():
                problem.call(fastkd, inputs)

        return forward
    leaf = inputs[0].requires_grad_()

    def forward_backward() -> None:
        outputs = [x for x in problem.call(fastkd, inputs) if x is not None and x.requires_grad]
        torch.autograd.grad(outputs, leaf, [torch.ones_like(x) for x in outputs])

    return forward_backward


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def traffic_of(problem: Problem) -> Traffic:
    """What a step must move."""
    return Traffic(problem.reads, problem.writes)


def roof_name(traffic: Traffic) -> str:
    """For the table."""
    writes = f", {traffic.writes} write" if traffic.writes else ""
    return f"{traffic.reads} read{'s' if traffic.reads > 1 else ''}{writes}"


def time_group(
    problems: Sequence[Problem], shape: Shape, budget: float, device: torch.device
) -> list[dict[str, Any]]:
    """Time problems that share their tensors, and their roofs, in turn."""
    print(f"begin: {', '.join(p.name for p in problems)}, {shape}", flush=True)
    tensors = problems[0].make(shape.rows, shape.vocab, shape.dtype, device)
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for problem in problems:
        step = step_of(problem, tensors)
        try:
            step()
            synchronize(device)
            steps[problem.name] = step
        except Exception as error:
            failed[problem.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    first = tensors[0]
    paired = len(tensors) > 1 and tensors[1].shape == first.shape
    second = tensors[1] if paired else first.detach().clone()
    kernels: dict[Traffic, dict[str, Step]] = {}
    for traffic in dict.fromkeys(traffic_of(p) for p in problems):
        kernels[traffic] = roofs(first, second, traffic)
        steps |= {f"{roof_name(traffic)}: {k}": step for k, step in kernels[traffic].items()}
    for step in steps.values():
        step()
    timings = time_interleaved(steps, device, budget)

    rows = []
    best: dict[Traffic, Timing] = {}
    for traffic, found in kernels.items():
        named = {k: timings[f"{roof_name(traffic)}: {k}"] for k in found}
        kernel = min(named, key=lambda k: named[k].median)
        best[traffic] = named[kernel]
        rows.append(as_row(f"roof: {roof_name(traffic)} ({kernel})", shape, traffic, named[kernel]))
    for problem in problems:
        traffic = traffic_of(problem)
        if problem.name in failed:
            row = {"problem": problem.name, "failed": failed[problem.name], **at(shape)}
        else:
            row = as_row(problem.name, shape, traffic, timings[problem.name])
            row["of_roof"] = best[traffic].median / timings[problem.name].median
        rows.append(row)
    return rows


def at(shape: Shape) -> dict[str, Any]:
    """Where a row of the table is."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return {"rows": shape.rows, "vocab": shape.vocab, "dtype": dtype}


def as_row(name: str, shape: Shape, traffic: Traffic, timing: Timing) -> dict[str, Any]:
    """A time and what it means."""
    speed = shape.traffic_bytes(traffic) / timing.median
    return {
        "problem": name,
        **at(shape),
        "ms": timing.median * 1e3,
        "spread": None if math.isnan(timing.spread) else timing.spread,
        "rounds": len(timing.samples),
        "gb_s": speed / 1e9,
    }


def time_ops(
    record: Record, options: argparse.Namespace, sizes: Sequence[int], device: torch.device
) -> None:
    """Every op at these numbers of rows."""
    problems = [PROBLEMS[name] for name in options.problems or PROBLEMS]
    problems = [p for p in problems if p.rows]
    for rows, kind in product(sizes, options.dtypes):
        dtype = DTYPES[kind]
        for make, group in groupby(problems, key=lambda p: p.make):
            del make
            free = available_memory(device)
            row_bytes = options.vocab * dtype.itemsize
            most = max(1, free // (TENSORS * row_bytes)) if free else rows
            shape = Shape(min(rows, most), options.vocab, dtype)
            try:
                for row in time_group(list(group), shape, options.budget, device):
                    record.add(row)
            except torch.OutOfMemoryError as error:
                record.add(
                    {"problem": "a group", "failed": str(error).splitlines()[0], **at(shape)}
                )
            torch.cuda.empty_cache()


def time_layers(record: Record, budget: float, device: torch.device) -> None:
    """acm beside one dense pair of products of torch's, which has cuBLAS do them."""
    import fastkd
    from benchmarks.bench_gated_routing import LEARNERS, dense, dense_weights, mixed_choices
    from benchmarks.bench_gated_routing import problem as layer

    for rows, width, hidden in LAYERS:
        exact = layer(rows, width, hidden)
        flops = 4 * rows * width * hidden * LEARNERS
        for kind, share in product(KINDS, SHARES):
            operands = tuple(x.to(device, DTYPES[kind]) for x in exact)
            choices = mixed_choices(rows, share).to(device)
            calls: dict[str, Callable[[], Tensor]] = {
                "acm": partial(fastkd.acm.hard, *operands, choices),
                "dense, cuBLAS": partial(dense, operands[0], *dense_weights(operands)),
            }
            with torch.no_grad():
                for call in calls.values():
                    call()
                timings = time_interleaved(calls, device, budget)
            whole = timings["dense, cuBLAS"].median
            for name, timing in timings.items():
                part = share if name == "acm" else 1.0
                sizes = f"{rows} x {width} x {hidden} x {LEARNERS}"
                record.add(
                    {
                        "problem": f"{name}, {sizes}, f = {share:g}",
                        "dtype": kind,
                        "ms": timing.median * 1e3,
                        "spread": timing.spread,
                        "tflop_s": part * flops / timing.median / 1e12,
                        "over_share_of_dense": timing.median / (part * whole),
                    }
                )


def host_microseconds(step: Step, calls: int = CALLS) -> float:
    """Median time until the call returns, while the device is not waited for."""
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def time_host(record: Record, options: argparse.Namespace, device: torch.device) -> None:
    """One small row: all that a call costs is the host's."""
    for name in options.problems or PROBLEMS:
        problem = PROBLEMS[name]
        tensors = problem.make(1, SMALL_VOCAB, torch.bfloat16, device)
        for gradient in (False, True):
            if gradient and not problem.leaves:
                continue
            step = step_of(problem, tensors, gradient=gradient)
            for _ in range(10):
                step()
            synchronize(device)
            found = {"host_us": host_microseconds(step), "gradient": gradient}
            synchronize(device)
            record.add({"problem": name, "rows": 1, "vocab": SMALL_VOCAB, **found})


def times(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Ops, layers, host."""
    device = torch.device(options.device)
    if device.type == "cuda":
        require_kernels()
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        record.facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    record.facts |= {"device": str(device), "torch": torch.__version__}
    # What is worth most comes first: time may run out.
    time_ops(record, options, options.rows[:1], device)
    if not options.problems:
        time_layers(record, options.budget, device)
    time_ops(record, options, options.rows[1:], device)
    time_host(record, options, device)
    failed = [row["problem"] for row in record.rows if "failed" in row]
    summary = f"{len(record.rows)} times"
    large = [r for r in record.rows if r.get("rows") == max(options.rows) and "of_roof" in r]
    if large:
        shares = [r["of_roof"] for r in large]
        summary += (
            f"; {min(shares):.0%} to {max(shares):.0%} of the roof at {large[0]['rows']} rows"
        )
    if failed:
        summary += f"; failed: {', '.join(failed)}"
    return not failed, summary


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=ROWS)
    add("--vocab", type=int, default=QWEN)
    add("--dtypes", nargs="+", choices=DTYPES, default=KINDS)
    add("--problems", nargs="+", choices=PROBLEMS, metavar="PROBLEM")
    add("--budget", type=float, default=0.6, help="seconds for the ops that share their tensors")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    return run("times", times, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
