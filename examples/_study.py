"""Shared by examples on SmolLM2: command line, text with the teacher's logits, training, scores."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _corpus import Windows, build_windows
from _models import Student, Teacher, load_teacher
from _training import Distillation
from rich.console import Console
from rich.progress import track
from torch import Tensor

import fastkd

LENGTH, BATCH = 128, 4

#: Logits of student and teacher ``[windows, length, vocab]`` and their windows, to a scalar.
StudyLoss = Callable[[Tensor, Tensor, Windows], Tensor]


@dataclass(frozen=True)
class Material:
    """Windows to train on and to score, and the teacher's bfloat16 logits over them."""

    train: Windows
    held: Windows
    train_logits: Tensor
    held_logits: Tensor
    teacher: Teacher
    tokenizer: Any

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Windows, Tensor]]:
        """Shuffled batches, epoch after epoch; of one seed they are always the same."""
        random = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(self.train) // BATCH, generator=random).tolist()
            rows = slice(first := order.pop() * BATCH, first + BATCH)
            yield self.train[rows], self.train_logits[rows]


@dataclass(frozen=True)
class Agreement:
    """How near a student is to the teacher on held-out text, means over its tokens."""

    kl: float
    acceptance: float
    top1: float


def parse_options(
    name: str, description: str, *, steps: int, windows: int, quick: tuple[int, int]
) -> argparse.Namespace:
    """Read the command line; `quick` has the steps and windows of a tiny run."""
    parser = command_line(name, description)
    parser.add_argument("--steps", type=positive, help=f"training steps (default: {steps})")
    parser.add_argument(
        "--windows",
        type=positive,
        help=f"pieces of {LENGTH} tokens to train on (default: {windows})",
    )
    options = parser.parse_args()
    options.steps = options.steps or (quick[0] if options.quick else steps)
    options.windows = max(BATCH, options.windows or (quick[1] if options.quick else windows))
    return options


def command_line(name: str, description: str) -> argparse.ArgumentParser:
    """The options of all these examples."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / f"{name}.png",
        help="where the figure goes; the numbers go beside it (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    return parser


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def load(options: argparse.Namespace, console: Console) -> tuple[Any, Teacher, Windows, Windows]:
    """Load SmolLM2, and cut CPython's text into windows: to train on, and held out."""
    with console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, teacher = load_teacher()
    windows = build_windows(
        tokenizer,
        train=options.windows,
        held_out=BATCH if options.quick else 4 * BATCH,
        length=LENGTH,
        seed=options.seed,
    )
    return tokenizer, teacher, *windows


def prepare(options: argparse.Namespace, console: Console) -> Material:
    """What :func:`load` does, and the teacher's logits, computed once."""
    tokenizer, teacher, train, held = load(options, console)
    logits = []
    for windows, what in ((train, "to teach"), (held, "to be compared")):
        pieces = windows.ids.split(BATCH)
        read = track(pieces, description=f"SmolLM2 reads {what}", console=console)
        logits.append(torch.cat([teacher.logits(i, batch=BATCH, advance=_nothing) for i in read]))
    return Material(train, held, *logits, teacher, tokenizer)


def _nothing(tokens: int) -> None:
    """Nobody waits for a batch of a batch."""


def new_student(material: Material, seed: int, *, dim: int = 128, layers: int = 3) -> Student:
    """A small student, the same for the same seed."""
    torch.manual_seed(seed)
    return Student(material.teacher.embedding, length=LENGTH, dim=dim, layers=layers, heads=4)


def train(
    name: str,
    student: Student,
    material: Material,
    loss: StudyLoss,
    *,
    steps: int,
    seed: int,
    console: Console,
) -> Distillation:
    """Train a student with a loss, and return its run."""
    run = Distillation(student, steps=steps, dtype=material.teacher.dtype)
    batches = material.batches(steps, seed)
    for windows, teacher_logits in track(
        batches, total=steps, description=f"Training by {name}", console=console
    ):
        with run.autocast():
            logits = run.student(windows.ids)
        loss(logits, teacher_logits, windows).backward()
        run.update()
    return run


@torch.no_grad()
def agreement(run: Distillation, material: Material) -> Agreement:
    """Compare a student with the teacher on held-out text."""
    sums = torch.zeros(3, dtype=torch.float64)
    pieces = material.held_logits.split(BATCH), material.held.mask.split(BATCH)
    for logits, theirs, mask in zip(run.logits(material.held, batch=BATCH), *pieces, strict=True):
        stats = fastkd.token_stats(logits, theirs)
        same = stats.student_argmax == stats.teacher_argmax
        for i, values in enumerate((stats.forward_kl, 1 - stats.tvd, same)):
            sums[i] += values[mask].sum().double()
    return Agreement(*(sums / material.held.tokens).tolist())


def as_dict(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary."""
    return dataclasses.asdict(value)
