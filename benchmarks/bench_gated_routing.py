"""fastkd.acm and acm.prefix_loss beside one dense GEMM pair and plain PyTorch.

Rows choose how many of N learners run on them, f of all on average; the dense pair is as wide as
all learners together, so that f times its time is what there is to reach. `--quick` takes a second
a case. Every contestant but the dense pair must give the value and gradients of the definition.

On AVX2 alone, the dense pair's library too: `MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2
python -m benchmarks.bench_gated_routing --isa x86_64_v3`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.command import RESULTS
from benchmarks.harness import OURS, SHARED_CORES, TOLERANCES
from benchmarks.measure import Memory, Timing, cpu_seconds_of_others, memory_of, time_interleaved
from benchmarks.report import finish_table, milliseconds, require_extra
from fastkd.acm import _kernels, _products

ROWS, WIDTH, LEARNERS, HIDDEN = 4096, 768, 4, 768
SHARES = (0.25, 0.5, 0.75, 1.0)
FEW = (1, 2, 4, 8, 16, 32, 64)
DENSE, ROUTING = "dense", "routing alone"
#: Times f x dense, and how much of the layer's time routing may take.
MOST_FORWARD, MOST_WITH_BACKWARD, MOST_PREFIX_LOSS, MOST_ROUTING = 0.97, 1.05, 1.2, 0.03

Step = Callable[[], Any]
#: x, w1, b1, w2.
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """What is timed, by contestant; the first is fastkd's."""

    name: str
    steps: dict[str, Step]
    #: What the dense pair's time is multiplied by.
    share: float
    #: At most so many times share x dense; None: nothing to reach.
    goal: float | None = None
    #: Of what peak memory is read.
    weighed: Sequence[str] = ()


@dataclass
class Outcome:
    """A case's times, memory, and whether it counts."""

    case: Case
    timings: dict[str, Timing]
    other_cores: float | None
    memory: dict[str, Memory | None] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether other processes spoiled the numbers."""
        return self.other_cores is not None and self.other_cores > SHARED_CORES

    def over_dense(self, name: str) -> float:
        """Median over share x the dense pair's."""
        return self.timings[name].median / (self.case.share * self.timings[DENSE].median)


def problem(rows: int, width: int = WIDTH, hidden: int = HIDDEN) -> Operands:
    """Weights of the scale that trained ones have."""
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, width, generator=random),
        torch.randn(LEARNERS, width, hidden, generator=random) / width**0.5,
        torch.randn(LEARNERS, hidden, generator=random),
        torch.randn(LEARNERS, hidden, width, generator=random) / hidden**0.5,
    )


def mixed_choices(rows: int, share: float) -> Tensor:
    """Choices of every size whose mean is as near share x N as whole numbers come, shuffled."""
    random = torch.Generator().manual_seed(1)
    choices = torch.rand(rows, LEARNERS, generator=random).lt(share).sum(-1)
    wanted = round(share * LEARNERS * rows)
    while (missing := wanted - int(choices.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = ((choices + step >= 0) & (choices + step <= LEARNERS)).nonzero().flatten()
        order = torch.randperm(len(movable), generator=random)[: abs(missing)]
        choices[movable[order]] += step
    return choices


def eager_prefixes(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, choices: Tensor) -> Tensor:
    """Sorted prefixes in plain autograd: what the op does, without its memory."""
    order = choices.argsort(descending=True)
    rows, out = x[order], x.new_zeros(x.size(0), w2.size(2))
    for n in range(w1.size(0)):
        count = int((choices > n).sum())
        part = F.gelu(rows[:count] @ w1[n] + b1[n]) @ w2[n]
        out = torch.cat([out[:count] + part, out[count:]])
    return torch.zeros_like(out).index_copy(0, order, out)


def eager_masks(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, choices: Tensor) -> Tensor:
    """Every learner on every row."""
    out = x.new_zeros(x.size(0), w2.size(2))
    for n in range(w1.size(0)):
        part = F.gelu(x @ w1[n] + b1[n]) @ w2[n]
        out = out + torch.where((choices > n).unsqueeze(-1), part, 0)
    return out


def eager_prefix_loss(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, target: Tensor) -> Tensor:
    """All prefixes stacked, [rows, N + 1, D]."""
    parts = [F.gelu(x @ w1[n] + b1[n]) @ w2[n] for n in range(w1.size(0))]
    prefixes = torch.stack([torch.zeros_like(target), *parts], 1).cumsum(1)
    return (prefixes - target.unsqueeze(1)).square().mean((0, 2))


def dense_weights(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """One Linear pair as wide as all learners: weights [out, in] and the hidden bias."""
    _, w1, b1, w2 = operands
    return (
        w1.permute(0, 2, 1).reshape(-1, w1.size(1)).contiguous(),
        b1.reshape(-1).clone(),
        w2.reshape(-1, w2.size(2)).T.contiguous(),
    )


def dense(x: Tensor, first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
    """Of Linear, GELU, Linear."""
    return F.linear(F.gelu(F.linear(x, first, bias)), second)


def forward(function: Callable[..., Tensor], inputs: Sequence[Tensor], *others: Any) -> Step:
    """Without autograd."""

    def step() -> Tensor:
        with torch.no_grad():
            return function(*inputs, *others)

    return step


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *others: Any
) -> Step:
    """With gradients of all inputs, from one fixed direction."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.no_grad():
        shape = function(*leaves, *others).shape
    direction = leaves[0].new_full(shape, 1 / max(shape.numel(), 1))

    def step() -> list[Tensor]:
        value = function(*leaves, *others)
        return [value.detach(), *torch.autograd.grad(value, leaves, direction)]

    return step


def check(name: str, steps: dict[str, Step], exact: Step) -> None:
    """SystemExit where a contestant's values or gradients are not the definition's."""
    right = exact()
    rights = right if isinstance(right, list) else [right]
    for contestant, step in steps.items():
        if contestant in (DENSE, ROUTING):
            continue
        found = step()
        for mine, true in zip(found if isinstance(found, list) else [found], rights, strict=True):
            error = ((mine.double() - true).norm() / true.norm()).item()
            if not error <= TOLERANCES[torch.float32]:
                raise SystemExit(f"bench_gated_routing: {name}: {contestant} is off by {error:.1e}")


def torch_prefixes(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, choices: Tensor) -> Tensor:
    """The same over sorted prefixes in torch's products, in place: other dtypes' way."""
    return _products.forward(x, w1, b1, w2, choices, None, "gelu", False, False)[0]


def routed_case(rows: int, share: float, gradient: bool, peers: bool) -> Case:
    """acm at a share, forward or with backward."""
    operands, choices = problem(rows), mixed_choices(rows, share)
    make = forward_backward if gradient else forward
    functions = {OURS: fastkd.acm.hard}
    if peers and not gradient:
        functions["torch's products"] = torch_prefixes
    if peers:
        functions |= {"eager prefixes": eager_prefixes, "eager masks": eager_masks}
    steps = {name: make(function, operands, choices) for name, function in functions.items()}
    steps[DENSE] = make(dense, (operands[0], *dense_weights(operands)))
    if not gradient and rows == ROWS:
        steps[ROUTING] = partial(_kernels.route, choices, LEARNERS)
    what = "forward + backward" if gradient else "forward"
    name = f"{rows:,} rows, f = {share:g}, {what}"
    exact = [value.double() for value in operands]
    check(name, steps, make(fastkd.reference.acm.hard, exact, choices))
    goal = MOST_WITH_BACKWARD if gradient else MOST_FORWARD
    # Few rows: never slower than the dense pair.
    return Case(name, steps, share, goal if rows == ROWS else 1 / share)


def prefix_case(peers: bool) -> Case:
    """acm.prefix_loss with gradients of the learners, as phase I takes it."""
    x, *weights = problem(ROWS)
    target = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))

    def ours(*leaves: Tensor) -> Tensor:
        return fastkd.acm.prefix_loss(x, *leaves, target)

    def eager(*leaves: Tensor) -> Tensor:
        return eager_prefix_loss(x, *leaves, target)

    def dense_loss(*leaves: Tensor) -> Tensor:
        return (dense(x, *leaves) - target).square().mean()

    def exact(*leaves: Tensor) -> Tensor:
        return fastkd.reference.acm.prefix_loss(x.double(), *leaves, target.double())

    steps = {OURS: forward_backward(ours, weights)}
    if peers:
        steps["eager, stacked"] = forward_backward(eager, weights)
    steps[DENSE] = forward_backward(dense_loss, dense_weights((x, *weights)))
    name = f"prefix loss, {ROWS:,} rows, forward + backward"
    check(name, steps, forward_backward(exact, [w.double() for w in weights]))
    return Case(name, steps, 1.0, MOST_PREFIX_LOSS, tuple(steps))


def cases(peers: bool) -> list[Callable[[], Case]]:
    """All comparisons; each is made when its turn comes."""
    found: list[Callable[[], Case]] = [
        partial(routed_case, ROWS, share, gradient, peers)
        for gradient in (False, True)
        for share in SHARES
    ]
    found += [partial(routed_case, rows, share, False, peers) for share in (0.5, 1) for rows in FEW]
    return [*found, partial(prefix_case, peers)]


def measure(case: Case, budget: float) -> Outcome:
    """Times, memory, and the cores that strangers kept busy meanwhile."""
    for step in case.steps.values():
        step()
    others, start = cpu_seconds_of_others(), time.perf_counter()
    timings = time_interleaved(case.steps, torch.device("cpu"), budget)
    now, other_cores = cpu_seconds_of_others(), None
    if others is not None and now is not None:
        other_cores = max(0.0, (now - others) / (time.perf_counter() - start))
    memory = {name: memory_of(case.steps[name], torch.device("cpu")) for name in case.weighed}
    return Outcome(case, timings, other_cores, memory)


def main(arguments: list[str] | None = None) -> int:
    """Run, show and save; the exit status is 1 if a goal was missed on an idle machine."""
    require_extra()
    from rich.table import Table

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a second a case")
    options.add_argument("--budget", type=float, help="seconds of timing a case, default: 10")
    options.add_argument("--isa", help="instruction set of fastkd's kernels, x86_64_v3 (AVX2)")
    options.add_argument("--only-fastkd", action="store_true", help="no other than the dense pair")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    chosen = options.parse_args(arguments)
    if chosen.isa:
        fastkd.cpu_capability(chosen.isa)
    budget = chosen.budget or (1.0 if chosen.quick else 10.0)

    sizes = f"D = {WIDTH}, N = {LEARNERS}, b = {HIDDEN}, float32"
    table = Table(title=f"Gated routing, {sizes}")
    for name in ("case", "contestant"):
        table.add_column(name)
    for name in ("median ms", "spread", "over f x dense", "peak MiB", "goal"):
        table.add_column(name, justify="right")
    kept, busy, missed = [], [], False
    for make in cases(not chosen.only_fastkd):
        outcome = measure(make(), budget)
        case = outcome.case
        ratio = outcome.over_dense(OURS)
        reached = case.goal is None or ratio <= case.goal
        if ROUTING in outcome.timings:
            routing = outcome.timings[ROUTING].median / outcome.timings[OURS].median
            reached = reached and routing <= MOST_ROUTING
        busy += [case.name] * outcome.shared
        missed |= not reached and not outcome.shared
        for name, timing in outcome.timings.items():
            memory, first = outcome.memory.get(name), name == OURS
            goal = f"{case.goal:g} x: {'yes' if reached else 'NO'}" if case.goal else ""
            share = timing.median / outcome.timings[OURS].median
            table.add_row(
                case.name if first else "",
                name,
                milliseconds(timing.median),
                f"{timing.spread:.0%}",
                f"{share:.1%} of acm" if name == ROUTING else f"{outcome.over_dense(name):.2f} x",
                f"{memory.peak / 2**20:.0f}" if memory else "",
                goal if first else "",
                style="bold" if first else None,
            )
        table.add_section()
        kept.append(
            {
                "case": case.name,
                "share": case.share,
                "median_ms": {name: t.median * 1e3 for name, t in outcome.timings.items()},
                "memory": {name: m and asdict(m) for name, m in outcome.memory.items()},
                "other_cores_busy": outcome.other_cores,
                "goal": case.goal,
                "reached": reached,
            }
        )
    finish_table(table, kept, busy, chosen.output / "gated_routing.json")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
