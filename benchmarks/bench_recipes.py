"""Recipes of fastkd.recipes beside their formulas in PyTorch, eager and compiled.

`--quick` is one small shape, `--recipe NAME ...` some of them; without options all at one shape.
Before the times comes a table of the bytes that a step's operators read and write, in tables
[rows, vocab] of bfloat16.
"""

import sys
from functools import partial

from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB
from benchmarks.command import budget_of, device_of, finish, parser, run_cases, settings_of
from benchmarks.recipe_cases import RECIPES, recipe_case, tables_moved


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    middle = {"dtype": "bfloat16", "vocab": MIDDLE_VOCAB, "rows": MIDDLE_ROWS}
    options = parser(__doc__.splitlines()[0], middle)
    options.add_argument("--recipe", nargs="+", choices=RECIPES, help="default: all")
    chosen = options.parse_args(arguments)
    if chosen.headline:
        options.error("--headline: no number is promised for recipes")
    device = device_of(chosen)
    names = chosen.recipe or list(RECIPES)
    show_bytes(names)
    axes = {axis: (value,) for axis, value in middle.items()}
    makers = [
        partial(recipe_case, name, **setting, peers=not chosen.only_fastkd)
        for setting in settings_of(chosen, middle, axes)
        for name in names
    ]
    results = run_cases(makers, device, budget_of(chosen), chosen.fresh_memory)
    return finish(results, chosen, "recipes")


def show_bytes(names: list[str]) -> None:
    """Print what each recipe and its eager formula move."""
    from rich.console import Console
    from rich.table import Table

    title = (
        r"Tables \[rows, vocab] of bfloat16 read and written by a step's operators (lower bound)"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("recipe", "fastkd", "eager", "times"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for name in names:
        ours, eager = (tables_moved(f) for f in (RECIPES[name].ours, RECIPES[name].definition))
        table.add_row(name, f"{ours:.1f}", f"{eager:.0f}", f"{eager / ours:.0f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
