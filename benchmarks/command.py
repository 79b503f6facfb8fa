"""The command line that all benchmarks share."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import OURS, Case, CaseResult, run_case
from benchmarks.report import busy_warning, machine_facts, require_extra, results_table, save
from benchmarks.shapes import DTYPES, LLAMA_2

RESULTS = Path(__file__).with_name("results")
SECONDS_A_CASE, QUICK_SECONDS_A_CASE = 10.0, 2.0
QUICK = {"vocab": LLAMA_2, "rows": 64}

Setting = dict[str, Any]


def parser(description: str, middle: Setting) -> argparse.ArgumentParser:
    """Options of every benchmark; `middle` says where an axis stays while others vary."""
    options = argparse.ArgumentParser(description=description)
    add = options.add_argument
    add("--quick", action="store_true", help="one small case or two, in about a minute")
    add("--headline", action="store_true", help="the numbers that must be reached, with verdicts")
    add("--dtype", nargs="+", choices=DTYPES, help=f"default: {middle['dtype']}")
    add("--vocab", nargs="+", type=_positive, help=f"default: {middle['vocab']}")
    add("--rows", nargs="+", type=_positive, help=f"default: {middle['rows']}")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--isa", help="instruction set of fastkd's CPU kernels, for example x86_64_v3 (AVX2)")
    add("--fresh-memory", action="store_true", help="fastkd must not use a gradient's memory again")
    add("--only-fastkd", action="store_true", help="no other contestant, only the roof")
    add("--budget", type=float, help=f"seconds of timing a case, default: {SECONDS_A_CASE:g}")
    add("--output", type=Path, default=RESULTS, help="folder for JSON and PNG")
    return options


def _positive(text: str) -> int:
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def settings_of(
    options: argparse.Namespace, middle: Setting, axes: Mapping[str, Sequence[Any]]
) -> list[Setting]:
    """Every combination of the axes given; with none given, each axis alone from the middle."""
    given = {axis: getattr(options, axis) for axis in axes if getattr(options, axis)}
    if options.quick:
        middle = middle | QUICK
    if given or options.quick:
        return [
            middle | dict(zip(given, values, strict=True)) for values in product(*given.values())
        ]
    walked = [middle | {axis: value} for axis, values in axes.items() for value in values]
    return [s for index, s in enumerate(walked) if s not in walked[:index]]


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device to run on, after switching the CPU kernels as asked."""
    import fastkd

    require_extra()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no usable GPU (torch.cuda.is_available() is False)")
    if options.isa:
        try:
            fastkd.cpu_capability(options.isa)
        except ValueError as error:
            raise SystemExit(f"--isa: {error}") from None
    return torch.device(options.device)


def budget_of(options: argparse.Namespace) -> float:
    """Return the seconds of timing that a case gets."""
    if options.budget is not None:
        return options.budget
    return QUICK_SECONDS_A_CASE if options.quick else SECONDS_A_CASE


def run_cases(
    makers: Sequence[Callable[[], Case]],
    device: torch.device,
    budget: float,
    fresh_memory: bool = False,
) -> list[CaseResult]:
    """Run cases one after another under a progress bar; each is made when its turn comes."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    results = []
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=len(makers))
        for index, make in enumerate(makers):
            case = make()

            def show(text: str, done: float, title: str = case.title, index: int = index) -> None:
                progress.update(bar, completed=index + done, description=f"{title}: {text}")

            results.append(run_case(case, device, budget, show, fresh_memory=fresh_memory))
    return results


def finish(
    results: list[CaseResult],
    options: argparse.Namespace,
    stem: str,
    goals: list[dict[str, Any]] | None = None,
) -> int:
    """Show and save results; return the exit status: 1 if fastkd failed or was wrong."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(results_table(results))
    facts = machine_facts(torch.device(options.device))
    console.print("  ".join(f"{k}: {v}" for k, v in facts.items()), style="dim", highlight=False)
    if warning := busy_warning(results):
        console.print(warning, style="bold red")
    for path in save(options.output, stem, results, facts, goals):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    ours = [m for r in results for m in r.measurements if m.name == OURS]
    return int(any(m.wrong or m.failed for m in ours))


def walk(
    description: str,
    stem: str,
    make_case: Callable[..., Case],
    axes: Mapping[str, Sequence[Any]],
    arguments: list[str] | None = None,
    *,
    variants: Sequence[Mapping[str, Any]] = ({},),
) -> int:
    """Run a benchmark of one case maker over dtype, vocabulary and rows; return the exit status.

    At each setting every one of `variants`, further arguments of the maker.
    """
    from benchmarks import headline
    from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB

    middle = {"dtype": "float32", "vocab": MIDDLE_VOCAB, "rows": MIDDLE_ROWS}
    options = parser(description, middle).parse_args(arguments)
    device = device_of(options)
    if options.headline:
        return headline.run(options, device, (stem,))
    makers = [
        partial(make_case, **setting, **variant, peers=not options.only_fastkd)
        for setting in settings_of(options, middle, axes)
        for variant in variants
    ]
    results = run_cases(makers, device, budget_of(options), options.fresh_memory)
    return finish(results, options, stem)
