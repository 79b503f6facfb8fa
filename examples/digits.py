"""Vision recipes on 1,797 real digits: small students with and without a teacher.

The digits (8 x 8 pixels) are scikit-learn's. Three small convolutional networks learn all labels of
1,200 of them; they are the teachers. A student of a tenth of their size learns in three settings:

* `few labels`: 60 of the 1,200 images have labels, the teacher answers on all of them.
* `long tail`: class c keeps 0.65^c of its images, the last ones a handful.
* `few bits`: the student's weights are rounded to 4 or 16 levels, by buckets.

Run, from the repository:

    pip install "fastkd[examples]"
    python examples/digits.py

It prints each recipe's accuracy on the other 597 digits (mean and range over seeds) beside the
student without a teacher; the figure goes to examples/output/digits.png.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import torch
    import torch.nn.functional as F
    from _report import ACCENT, NEUTRAL, plt, save, save_numbers, show, style
    from _study import command_line, positive
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.func import functional_call

    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"digits: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]"'
    ) from missing

TRAIN, LABELLED, CLASSES, SUBCLASSES, BATCH = 1200, 60, 10, 4, 100
STEPS, SEEDS = 240, 3
QUICK_STEPS, QUICK_SEEDS = 6, 1
TEACHER_WIDTH, STUDENT_WIDTH = 32, 6
LEVELS = {"2 bits": 4, "4 bits": 16}


class Net(nn.Module):
    """Two convolutions, whose maps the first `forward` result is; a hidden layer; heads."""

    def __init__(self, width: int, outputs: tuple[int, ...] = (CLASSES,)) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.hidden = nn.Linear(16 * width, 2 * width)
        self.heads = nn.ModuleList(nn.Linear(2 * width, n) for n in outputs)
        self.project = nn.Conv2d(width, TEACHER_WIDTH, 1)  # to the teacher's channels, for cwd

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images ``[B, 1, 8, 8]`` to maps, hidden states and the logits of each head."""
        maps = F.relu(self.second(F.relu(self.first(x))))
        hidden = F.relu(self.hidden(F.avg_pool2d(maps, 2).flatten(1)))
        return maps, hidden, [head(hidden) for head in self.heads]


@dataclass(frozen=True)
class Digits:
    """Images and labels of a training set; which images have a label for the student."""

    images: Tensor
    labels: Tensor
    known: Tensor

    def __getitem__(self, rows: Tensor) -> "Digits":
        """Return some of the images."""
        return Digits(self.images[rows], self.labels[rows], self.known[rows])


@dataclass(frozen=True)
class Teaching:
    """What the three teachers say of a batch; maps and hidden states are the first one's."""

    maps: Tensor
    hidden: Tensor
    logits: list[Tensor]
    subclasses: Tensor

    def __getitem__(self, rows: Tensor) -> "Teaching":
        """Return some of the images."""
        logits = [z[rows] for z in self.logits]
        return Teaching(self.maps[rows], self.hidden[rows], logits, self.subclasses[rows])


#: The student, its maps and logits, the batch, the teaching: a term beside the labels'.
Term = Callable[[Net, Tensor, list[Tensor], Digits, Teaching], Tensor]


@dataclass(frozen=True)
class Method:
    """A student's heads and loss; `levels` rounds its weights."""

    setting: str
    term: Term | None
    outputs: tuple[int, ...] = (CLASSES,)
    #: Whether the labels' cross-entropy is added: where the recipe is not the total.
    with_labels: bool = True
    levels: int | None = None


@dataclass
class Result:
    """Accuracies over seeds, and seconds of a run."""

    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def kd(net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching) -> Tensor:
    """Hinton's."""
    return recipes.kd(logits[0], teaching.logits[0], temperature=4.0)


def dkd(net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching) -> Tensor:
    """Target and other classes apart; where there is no label, the teacher's answer is it."""
    labels = torch.where(batch.known, batch.labels, teaching.logits[0].argmax(-1))
    return recipes.dkd(logits[0], teaching.logits[0], labels)


def dist(net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching) -> Tensor:
    """Correlations of rows and of columns."""
    return recipes.dist(logits[0], teaching.logits[0])


def meal_v2(
    net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching
) -> Tensor:
    """The mean of all three teachers."""
    return recipes.meal_v2(logits[0], teaching.logits)


def lelp(net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching) -> Tensor:
    """Subclasses invented from the teacher's hidden states."""
    return recipes.lelp(logits[0], teaching.logits[0], teaching.subclasses)


def cwd(net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching) -> Tensor:
    """Where each channel looks, beside Hinton's."""
    return kd(net, maps, logits, batch, teaching) + recipes.cwd(net.project(maps), teaching.maps)


def deit_lt(
    net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching
) -> Tensor:
    """Two heads: one for the labels, one for the teacher's answers."""
    return recipes.deit_lt(logits[0], logits[1], teaching.logits[0], batch.labels)


def quantised(
    net: Net, maps: Tensor, logits: list[Tensor], batch: Digits, teaching: Teaching
) -> Tensor:
    """0.7 x Hinton's + 0.3 x cross-entropy."""
    return recipes.quantized_distillation(logits[0], teaching.logits[0], batch.labels)


METHODS = {
    "no teacher": Method("few labels", None),
    "kd": Method("few labels", kd),
    "dkd": Method("few labels", dkd),
    "dist": Method("few labels", dist),
    "meal_v2": Method("few labels", meal_v2),
    "lelp": Method("few labels", lelp, (CLASSES * SUBCLASSES,)),
    "cwd + kd": Method("few labels", cwd),
    "no teacher, long tail": Method("long tail", None),
    "deit_lt": Method("long tail", deit_lt, (CLASSES, CLASSES), with_labels=False),
    **{
        f"{name}, {bits}": Method("few bits", term, with_labels=term is None, levels=levels)
        for bits, levels in LEVELS.items()
        for name, term in (("no teacher", None), ("quantised", quantised))
    },
}


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    results = {name: Result() for name in METHODS}
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=options.seeds * (3 + len(METHODS)))
        for seed in range(options.seed, options.seed + options.seeds):
            train, held = digits(seed)
            teachers = []
            for which in range(3):
                progress.update(bar, description="a teacher", advance=1)
                torch.manual_seed(1000 * seed + which)
                net = Net(TEACHER_WIDTH)
                everything = Digits(train.images, train.labels, torch.ones_like(train.known))
                fit(net, Method("", None), everything, None, options.steps, seed)
                teachers.append(net.eval())
            teaching = teach(teachers, train, seed)
            for name, method in METHODS.items():
                progress.update(bar, description=name, advance=1)
                lesson = setting_of(method.setting, train, teaching)
                torch.manual_seed(seed)
                student = Net(STUDENT_WIDTH, method.outputs)
                start = time.perf_counter()
                fit(student, method, *lesson, options.steps, seed)
                results[name].seconds.append(time.perf_counter() - start)
                results[name].accuracy.append(accuracy(student, method, held))
            own = [accuracy(net, Method("", None), held) for net in teachers]
    rows = [
        [
            METHODS[name].setting,
            name,
            f"{100 * statistics.mean(r.accuracy):.1f}",
            f"{100 * min(r.accuracy):.1f} to {100 * max(r.accuracy):.1f}",
            f"{statistics.mean(r.seconds):.2f}",
        ]
        for name, r in results.items()
    ]
    headings = ["setting", "student learns by", "accuracy, %", "range", "seconds"]
    title = f"597 held-out digits; teachers: {100 * max(own):.1f} %"
    show(console, title, headings, rows, left=2)
    draw(options, results, console)
    save_numbers(options.output.with_suffix(".json"), {"teachers": own, "students": results})


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line("digits", "Vision recipes on scikit-learn's digits.")
    parser.add_argument("--steps", type=positive, help=f"training steps (default: {STEPS})")
    parser.add_argument("--seeds", type=positive, help=f"runs of each recipe (default: {SEEDS})")
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    return options


def digits(seed: int) -> tuple[Digits, Digits]:
    """The digits in random order: to train on, and held out."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    known = torch.zeros(len(labels), dtype=torch.bool)
    known[:LABELLED] = True
    everything = Digits(images[order], labels[order], known)
    place = torch.arange(len(labels))
    return everything[place[:TRAIN]], everything[place[TRAIN:]]


def setting_of(setting: str, train: Digits, teaching: Teaching) -> tuple[Digits, Teaching]:
    """The images that a setting trains on: all with few labels, or some or all with all labels."""
    if setting == "few labels":
        return train, teaching
    rows = torch.arange(len(train.labels))
    if setting == "long tail":
        of_class = [(train.labels == c).nonzero().flatten() for c in range(CLASSES)]
        rows = torch.cat([r[: max(2, round(0.65**c * len(r)))] for c, r in enumerate(of_class)])
    known = torch.ones(len(rows), dtype=torch.bool)
    return Digits(train.images[rows], train.labels[rows], known), teaching[rows]


@torch.no_grad()
def teach(teachers: list[Net], train: Digits, seed: int) -> Teaching:
    """All answers, once."""
    answers = [net(train.images) for net in teachers]
    maps, hidden, logits = answers[0]
    random = torch.Generator().manual_seed(seed)
    (head,) = teachers[0].heads
    subclasses = recipes.lelp_subclasses(
        hidden, logits[0].argmax(-1), head.weight, SUBCLASSES, generator=random
    )
    return Teaching(maps, hidden, [found[2][0] for found in answers], subclasses)


def forward(
    net: Net, method: Method, images: Tensor, *, training: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The network, its matrices rounded where the method says so."""
    if method.levels is None:
        return net(images)
    rounded = {
        name: recipes.bucket_quantize(p, method.levels, straight_through=training)
        for name, p in net.named_parameters()
        if p.dim() > 1
    }
    return functional_call(net, rounded, (images,))


def fit(
    net: Net, method: Method, train: Digits, teaching: Teaching | None, steps: int, seed: int
) -> None:
    """Train a network."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    # Without a teacher only images with a label teach anything.
    usable = train.known.nonzero().flatten() if method.term is None else None
    for _ in range(steps):
        count = len(train.labels) if usable is None else len(usable)
        rows = torch.randint(count, (min(BATCH, count),), generator=random)
        rows = rows if usable is None else usable[rows]
        batch = train[rows]
        maps, _, logits = forward(net, method, batch.images, training=True)
        loss = logits[0].new_zeros(())
        if method.with_labels and batch.known.any():
            probs = class_log_probs(logits)
            loss = F.nll_loss(probs[batch.known], batch.labels[batch.known])
        if method.term is not None and teaching is not None:
            loss = loss + method.term(net, maps, logits, batch, teaching[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def class_log_probs(logits: list[Tensor]) -> Tensor:
    """Log-probabilities of the classes: of subclasses the sum, of two heads the mean."""
    found = [z.log_softmax(-1).unflatten(-1, (CLASSES, -1)).logsumexp(-1) for z in logits]
    return torch.stack(found).logsumexp(0) - torch.tensor(len(found)).log()


@torch.no_grad()
def accuracy(net: Net, method: Method, held: Digits) -> float:
    """Share of held-out digits that are recognised."""
    _, _, logits = forward(net, method, held.images, training=False)
    return (class_log_probs(logits).argmax(-1) == held.labels).float().mean().item()


def draw(options: argparse.Namespace, results: dict[str, Result], console: Console) -> None:
    """A panel a setting; a dot a seed."""
    style()
    settings = {method.setting: 0 for method in METHODS.values()}
    counts = [sum(m.setting == s for m in METHODS.values()) for s in settings]
    figure, panels = plt.subplots(
        1, len(settings), figsize=(13, 4.4), width_ratios=counts, layout="constrained"
    )
    for panel, setting in zip(panels, settings, strict=True):
        names = [name for name, method in METHODS.items() if method.setting == setting]
        for place, name in enumerate(names):
            found = [100 * a for a in results[name].accuracy]
            colour = NEUTRAL if name.startswith("no teacher") else ACCENT
            panel.scatter([place] * len(found), found, color=colour, s=22, alpha=0.5)
            mean = statistics.mean(found)
            panel.plot([place - 0.25, place + 0.25], [mean, mean], color=colour, linewidth=3)
            panel.annotate(
                f"{mean:.1f}",
                (place, max(found)),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight="bold",
            )
        labels = [name.replace(", ", ",\n").replace(" + ", "\n+ ") for name in names]
        panel.set_xticks(range(len(names)), labels)
        panel.set(title=setting, xlim=(-0.6, len(names) - 0.4))
        panel.margins(y=0.2)
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("accuracy on held-out digits, %")
    save(
        figure,
        options.output,
        console,
        "Small students on 1,797 real digits: without a teacher, and by each recipe",
    )


if __name__ == "__main__":
    main()
