"""softmax_divergence where the vocabulary is split over processes, beside one process.

    python -m benchmarks.bench_sharded --processes 2 --rows 256 --vocab 32000 [--features 512]

With ``--features`` the logits are those of linear heads, split likewise, and a step also computes
the gradients of hidden states and weight.
Each process has one thread. A step is the loss and its gradient. In each round all processes take a
step on their columns, then the first alone takes one on the whole vocabulary. The table has medians
of CPU time of the first process, which other programs disturb little, and of wall time: the
collectives are in both. "work" is the CPU time of a step on the columns times the processes,
divided by that of a step on the whole: 1 if splitting cost nothing. Bytes are those that a process
sends for each row and collective; eager PyTorch on DTensors gathers all logits, 8 bytes a column.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastkd
from benchmarks.shapes import DIVERGENCES
from fastkd._ops.shards import Shards
from tests.group_end import leave


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """The CPU and the wall time of a step, in milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3


def step(sides: list[list[torch.Tensor]], labels: torch.Tensor, **options) -> None:
    """A loss and its gradient. A side: logits, or hidden states and weight."""
    for x in sides[0]:
        x.grad = None
    student, teacher = (x[0] if len(x) == 1 else fastkd.LinearLogits(*x) for x in sides)
    fastkd.softmax_divergence(student, teacher, labels=labels, **options).backward()


def run(rank: int, options: argparse.Namespace, store: str) -> None:
    """One process. The first prints the table."""
    torch.set_num_threads(1)
    size = options.processes
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    dtype, width = getattr(torch, options.dtype), options.vocab // size
    torch.manual_seed(0)
    columns = slice(rank * width, (rank + 1) * width)
    whole, parts = [], []
    for _ in range(2):
        if options.features:
            hidden = torch.randn(options.rows, options.features).to(dtype)
            weight = torch.randn(width * size, options.features) / options.features**0.5
            weight = weight.to(dtype)
            whole.append([hidden, weight])
            parts.append([hidden.clone(), weight[columns].clone()])
        else:
            logits = torch.randn(options.rows, width * size).to(dtype)
            whole.append([logits])
            parts.append([logits[:, columns].clone()])
    labels = torch.randint(0, width * size, (options.rows,))
    for x in (*whole[0], *parts[0]):
        x.requires_grad_()
    sent: list[int] = []
    gather, add_up = Shards.gather, Shards.add_up

    def gathered(self, numbers, dtype):
        sent.append(numbers.numel() * dtype.itemsize // options.rows)
        return gather(self, numbers, dtype)

    def added(self, x):
        sent.append(x.numel() * x.element_size() // options.rows)
        add_up(self, x)

    Shards.gather, Shards.add_up = gathered, added  # type: ignore[method-assign]
    if rank == 0:
        print(
            f"{options.rows} rows x {width * size} {options.dtype}"
            + (f" of {options.features} features" if options.features else "")
            + f", {size} processes, one thread each; milliseconds, CPU (wall)"
        )
        heads = ("split", "whole", "work", "bytes a row")
        print(f"{'divergence':26}" + "".join(f"{x:>18}" for x in heads))
    for divergence in DIVERGENCES:
        if divergence == "decoupled_kl":
            continue
        split = partial(step, parts, labels, divergence=divergence, group=dist.group.WORLD)
        alone = partial(step, whole, labels, divergence=divergence)
        times: list[list[tuple[float, float]]] = [[], []]
        for repeat in range(options.rounds + 1):
            dist.barrier()
            sent.clear()
            found = [timed(split)]
            dist.barrier()
            if rank == 0:
                found.append(timed(alone))
                if repeat:
                    for one, row in zip(found, times, strict=True):
                        row.append(one)
        if rank != 0:
            continue
        medians = [[statistics.median(x) for x in zip(*row, strict=True)] for row in times]
        cells = [f"{cpu:.1f} ({wall:.1f})" for cpu, wall in medians]
        cells += [f"{medians[0][0] * size / medians[1][0]:.2f}", " + ".join(map(str, sent))]
        print(f"{divergence:26}" + "".join(f"{x:>18}" for x in cells), flush=True)
    leave()


def main() -> None:
    """Spawn the processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--features", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (options, f"{folder}/store"), nprocs=options.processes)


if __name__ == "__main__":
    main()
