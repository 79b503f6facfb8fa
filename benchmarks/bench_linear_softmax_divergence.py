"""fastkd.linear_softmax_divergence beside the bare matrix products, PyTorch, Liger and TRL.

Loss and gradients of the student's hidden states and head, from hidden states: 4 products of the
sizes of the case are what nobody can do without. They are timed with results whose memory is ready,
in float32 and, for 16-bit heads where the processor multiplies such matrices, in their dtype; the
faster one counts. On other processors PyTorch's 16-bit products take many times as long as float32
ones, and so does everybody who uses them. Times are CPU seconds of this process, so that other
processes disturb them less. `--quick` takes one small case of each dtype and divergence.

Comparisons: `pip install --no-deps liger-kernel==0.8.5 triton`, `pip install trl==1.16.0`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.baselines import LIGER, softmax_divergence_contestants
from benchmarks.command import RESULTS
from benchmarks.harness import OURS, SHARED_CORES, TOLERANCES
from benchmarks.measure import MIB, Memory, cpu_seconds_of_others, memory_of
from benchmarks.report import finish_table, milliseconds, require_extra
from benchmarks.shapes import DTYPES, QWEN
from fastkd._ops.linear.products import multiplies

TRL = "trl==1.16.0"
#: Rows, features, vocabulary.
SIZES = ((2048, 1024, 49_152), (512, 1024, QWEN))
QUICK = ((256, 128, 32_000),)
#: At most so many times the bare products.
GOALS = {("float32", "forward_kl"): 1.05, ("float32", "jsd"): 1.08}
BETAS = {"forward_kl": 0.0, "jsd": 0.5}
PRODUCTS = "products"

#: Hidden states and head of the student, hidden states and head of the teacher.
Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def operands(rows: int, features: int, vocab: int, dtype: torch.dtype) -> Operands:
    """A student that agrees with its teacher about as well as a trained one does."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=random)
    weight = torch.randn(vocab, features, generator=random) * 2 / features**0.5
    teacher = hidden + 0.3 * torch.randn(rows, features, generator=random)
    other = weight + 0.3 * torch.randn(vocab, features, generator=random) / features**0.5
    student = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    return student[0], student[1], teacher.to(dtype), other.to(dtype)


def losses(divergence: str, peers: bool) -> dict[str, Loss]:
    """Everybody who computes this divergence from hidden states, as the mean over rows."""

    def ours(h: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return fastkd.linear_softmax_divergence(h, w, t, v, divergence=divergence)

    found: dict[str, Loss] = {OURS: ours}
    if not peers:
        return found
    named = {c.name: c.loss for c in softmax_divergence_contestants(divergence, packages=False)}

    def eager(h: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return named["eager"](F.linear(h, w), F.linear(t, v))

    def stored(h: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return fastkd.softmax_divergence(F.linear(h, w), F.linear(t, v), divergence=divergence)

    found["fastkd, logits stored"] = stored
    found["eager"], found["torch.compile"] = eager, torch.compile(eager, dynamic=False)
    found |= _liger(divergence) | _trl(divergence)
    return found


def _liger(divergence: str) -> dict[str, Loss]:
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        print(f"!!! liger is not compared ({error}): pip install --no-deps {LIGER} triton")
        return {}
    function = LigerFusedLinearJSDLoss(0.0, 1.0, BETAS[divergence], compiled=True)

    def loss(h: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return function(h, w, t, v, torch.zeros(h.size(0), dtype=torch.long))

    return {"liger": loss}


def _trl(divergence: str) -> dict[str, Loss]:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        print(f"!!! trl is not compared ({error}): pip install {TRL}")
        return {}

    def loss(h: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
        found = ChunkedDivergenceFunction.apply(h, w, None, t, v, None, BETAS[divergence])
        return found[0].mean()

    return {"trl": loss}


def bare_products(given: Operands, dtype: torch.dtype) -> Callable[[], None]:
    """The four products, in a dtype, into memory that is ready."""
    h, w, t, v = (x.detach().to(dtype) for x in given)
    student = torch.empty(h.size(0), w.size(0), dtype=dtype)
    teacher, of_h, of_w = torch.empty_like(student), torch.empty_like(h), torch.empty_like(w)

    def step() -> None:
        torch.mm(h, w.mT, out=student)
        torch.mm(t, v.mT, out=teacher)
        torch.mm(student, w, out=of_h)
        torch.mm(student.mT, h, out=of_w)

    return step


def wrong(loss: Loss, divergence: str, dtype: torch.dtype) -> str | None:
    """What is wrong with a loss or its gradients on a small problem, against float64."""
    given = operands(48, 64, 1000, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    true = fastkd.reference.linear_softmax_divergence(*exact, divergence=divergence)
    found = loss(*given)
    error = (abs(found.detach().double() - true.detach()) / true.detach()).item()
    true.backward()
    found.backward()
    parts = [f"loss off by {error:.1e}"] if not error <= TOLERANCES[dtype] else []
    for name, mine, exactly in zip(("hidden", "weight"), given, exact, strict=False):
        if mine.grad is None or exactly.grad is None:
            return f"no gradient of the {name}"
        error = ((mine.grad.double() - exactly.grad).norm() / exactly.grad.norm()).item()
        if not error <= TOLERANCES[dtype]:
            parts.append(f"gradient of the {name} off by {error:.1e}")
    return ", ".join(parts) or None


@dataclass
class Outcome:
    """CPU seconds of each contestant in each round, peak memory, and what is wrong."""

    name: str
    seconds: dict[str, list[float]]
    memory: dict[str, Memory | None]
    remarks: dict[str, str]
    other_cores: float | None
    goal: float | None

    def median(self, name: str) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds[name])

    @property
    def products(self) -> float:
        """The faster products' time."""
        return min(self.median(name) for name in self.seconds if name.startswith(PRODUCTS))


def measure(
    size: tuple[int, int, int], dtype: str, divergence: str, rounds: int, peers: bool
) -> Outcome:
    """Time everybody in turn, then read the peak memory of a step."""
    torch.compiler.reset()
    rows, features, vocab = size
    title = f"{divergence}, {rows:,} x {features:,} x {vocab:,} {dtype}"
    given = operands(*size, DTYPES[dtype])
    remarks: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {}
    kinds = [torch.float32]
    if dtype != "float32" and multiplies(DTYPES[dtype], torch.device("cpu")):
        kinds.insert(0, DTYPES[dtype])
    for kind in kinds:
        steps[f"{PRODUCTS}, {str(kind).removeprefix('torch.')}"] = bare_products(given, kind)
    for name, loss in losses(divergence, peers).items():

        def step(loss: Loss = loss) -> None:
            loss(*given).backward()
            given[0].grad = given[1].grad = None

        print(f"{title}: checking {name}", file=sys.stderr)
        try:
            if remark := wrong(loss, divergence, DTYPES[dtype]):
                remarks[name] = remark
            step()
            steps[name] = step
        except Exception as error:  # a peer may raise anything, and must not end the others' run
            remarks[name] = f"not run: {type(error).__name__}: {str(error).splitlines()[0]}"
    for name in list(steps):
        if name.startswith(PRODUCTS):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, others, start = list(steps), cpu_seconds_of_others(), time.perf_counter()
    for turn in range(rounds):
        print(f"{title}: round {turn + 1} of {rounds}", file=sys.stderr)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - begin)
    now, other_cores = cpu_seconds_of_others(), None
    if others is not None and now is not None:
        other_cores = max(0.0, (now - others) / (time.perf_counter() - start))
    memory = {}
    for name in steps:
        fastkd.release_memory()
        if not name.startswith(PRODUCTS):
            memory[name] = memory_of(steps[name], torch.device("cpu"))
    fastkd.release_memory()
    return Outcome(title, seconds, memory, remarks, other_cores, GOALS.get((dtype, divergence)))


def add_rows(table: Any, outcome: Outcome) -> None:
    """The outcome's rows of the table."""
    for i, (name, seconds) in enumerate(outcome.seconds.items()):
        ratio = outcome.median(name) / outcome.products
        memory = outcome.memory.get(name)
        spread = (max(seconds) - min(seconds)) / outcome.median(name)
        goal = ""
        if name == OURS and outcome.goal:
            goal = f"{outcome.goal:g} x: {'yes' if ratio <= outcome.goal else 'NO'}"
        table.add_row(
            outcome.name if i == 0 else "",
            name,
            milliseconds(outcome.median(name)),
            f"{spread:.0%}",
            f"{ratio:.2f} x",
            f"{memory.peak / MIB:.0f}" if memory else "",
            goal,
            style="bold" if name == OURS else None,
        )
    for name, remark in outcome.remarks.items():
        table.add_row("", f"[yellow]{name}: {remark}")
    table.add_section()


def main(arguments: list[str] | None = None) -> int:
    """Run, show and save; the exit status is 1 if fastkd is wrong."""
    require_extra()
    from rich.table import Table

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = options.add_argument
    add("--quick", action="store_true", help="one small case of each divergence and dtype")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--divergence", nargs="+", choices=tuple(BETAS), default=list(BETAS))
    add("--size", nargs=3, type=int, action="append", metavar=("ROWS", "FEATURES", "VOCAB"))
    add("--rounds", type=int, default=3, help="steps of each contestant")
    add("--threads", type=int, help="of PyTorch; default: all cores")
    add("--only-fastkd", action="store_true", help="no other than the products")
    add("--output", type=Path, default=RESULTS, help="folder for JSON")
    chosen = options.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    sizes = [tuple(s) for s in chosen.size or (QUICK if chosen.quick else SIZES)]
    table = Table(title="A step from hidden states beside its four matrix products")
    for name in ("case", "contestant"):
        table.add_column(name)
    for name in ("CPU ms", "spread", "over products", "peak MiB", "goal"):
        table.add_column(name, justify="right")
    kept, busy, failed = [], [], False
    for size in sizes:
        for dtype in chosen.dtype:
            for divergence in chosen.divergence:
                outcome = measure(size, dtype, divergence, chosen.rounds, not chosen.only_fastkd)
                add_rows(table, outcome)
                failed |= OURS in outcome.remarks
                shared = outcome.other_cores is not None and outcome.other_cores > SHARED_CORES
                busy += [outcome.name] * shared
                kept.append(
                    {
                        "case": outcome.name,
                        "cpu_seconds": outcome.seconds,
                        "over_products": {
                            name: outcome.median(name) / outcome.products
                            for name in outcome.seconds
                        },
                        "peak_bytes": {n: m and m.peak for n, m in outcome.memory.items()},
                        "remarks": outcome.remarks,
                        "other_cores_busy": outcome.other_cores,
                        "goal": outcome.goal,
                    }
                )
    finish_table(table, kept, busy, chosen.output / "linear_softmax_divergence.json")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
